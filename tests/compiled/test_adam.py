"""FusedAdam is torch's fused Adam: the same numbers, if compiled up to rounding, states and checkpoints."""

import copy

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO
from registry import data, pair
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import pyro_vae as pv
from pyro_vae.compiled.cpu import adam as adam_module
from pyro_vae.compiled.cpu import cpp_kernels
from pyro_vae.compiled.cpu.adam import FusedAdam

# torch 2.11 warns while its compiler is imported.
compiles = pytest.mark.filterwarnings("default")


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = [(40, 30), (30,), (), (7, 1)]
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def train(optimizer, params, steps, seed=1, without=()):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for i, p in enumerate(params):
            gradient = torch.randn(p.shape, generator=generator).to(p.dtype)
            p.grad = None if i in without else gradient
        optimizer.step()


def both(**options):
    ours, theirs = parameters(), parameters()
    return (ours, FusedAdam(ours, **options)), (theirs, torch.optim.Adam(theirs, fused=True, **options))


def assert_same(ours, theirs):
    for p, q in zip(ours[0], theirs[0], strict=True):
        assert torch.equal(p, q)
        mine, its = ours[1].state[p], theirs[1].state[q]
        assert mine.keys() == its.keys()
        assert all(torch.equal(mine[key], its[key]) for key in mine)


@pytest.mark.parametrize(
    "options", [{}, {"lr": 0.03, "betas": (0.5, 0.8), "eps": 1e-2}, {"weight_decay": 0.1}], ids=str
)
def test_every_number_is_torch_s(options):
    ours, theirs = both(**options)
    for params, optimizer in (ours, theirs):
        train(optimizer, params, 3)
        optimizer.param_groups[0]["lr"] *= 0.5  # as a scheduler does
        train(optimizer, params, 3)
    assert_same(ours, theirs)


@pytest.fixture
def loops(monkeypatch):
    """The sizes of the parameters that the compiled loop has updated."""
    sizes = []
    loop = adam_module._kernel()

    def counted(*tensors_and_size):
        sizes.append(tensors_and_size[-1])
        loop(*tensors_and_size)

    monkeypatch.setattr(adam_module, "_kernel", lambda: counted)
    return sizes


OPTIONS = [
    {},
    {"lr": 0.03, "betas": (0.5, 0.8), "eps": 1e-2},
    {"weight_decay": 0.1},
    {"betas": (0.0, 0.9), "lr": torch.tensor(0.02)},
]


@compiles
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_compiled_loop_is_adam_s_up_to_rounding(options, loops):
    ours, exact = parameters(), [p.data.double().requires_grad_() for p in parameters()]
    compiled, plain = (
        FusedAdam(ours, **options, compiled=True),
        torch.optim.Adam(exact, foreach=False, **options),
    )
    for optimizer, params in ((compiled, ours), (plain, exact)):
        train(optimizer, params, 3)
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"] * 0.5
        train(optimizer, params, 20)
    assert loops == 23 * [p.numel() for p in ours]
    for p, q in zip(ours, exact, strict=True):
        # An update is about lr in size: a thousandth of a percent of it, and p's own rounding at each step.
        torch.testing.assert_close(p.double(), q, rtol=3e-6, atol=1e-6)
        assert float(compiled.state[p]["step"]) == 23
        for key in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(
                compiled.state[p][key].double(), plain.state[q][key], rtol=1e-5, atol=1e-6
            )


@compiles
def test_a_small_gradient_after_a_large_one_counts_where_nothing_is_remembered():
    p = torch.nn.Parameter(torch.zeros(20))
    optimizer = FusedAdam([p], betas=(0.0, 0.0), lr=0.1, compiled=True)
    for slope in (1e4, 1e-4):
        p.grad = torch.full((20,), slope)
        optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((20,), -0.2), rtol=1e-3, atol=0)


@compiles
def test_an_infinite_parameter_stays_infinite_and_its_running_means_stay_finite():
    trained = []
    for compiled in (True, False):
        p = torch.nn.Parameter(torch.tensor([0.0, 1.0, -torch.inf]))
        optimizer = FusedAdam([p], lr=0.1, compiled=compiled)
        for _ in range(2):
            p.grad = None
            (-p.log_softmax(0)[0]).backward()
            optimizer.step()
        trained.append([p.detach(), optimizer.state[p]["exp_avg"]])
    torch.testing.assert_close(*trained)


@compiles
@pytest.mark.parametrize("size", [0, 1, 33, 100_003])
def test_threads_share_the_compiled_loop_and_leave_nothing_out(size):
    before = torch.get_num_threads()
    found = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            p = torch.nn.Parameter(torch.ones(size))
            optimizer = FusedAdam([p], lr=0.1, compiled=True)
            train(optimizer, [p], 3)
            found.append([p.detach(), *optimizer.state[p].values()])
    finally:
        torch.set_num_threads(before)
    p = torch.nn.Parameter(torch.ones(size))
    optimizer = torch.optim.Adam([p], lr=0.1, foreach=False)
    train(optimizer, [p], 3)
    # A vector's remainder goes number by number.
    for several in found:
        torch.testing.assert_close(several, [p.detach(), *optimizer.state[p].values()], rtol=1e-5, atol=1e-5)


@compiles
def test_what_the_compiled_loop_does_not_take_is_updated_all_the_same(loops):
    trained = []
    for compiled in (True, False):
        generator = torch.Generator().manual_seed(3)
        params = [*parameters(), torch.nn.Parameter(torch.ones(6, 8).t()), *parameters(torch.float64)]
        optimizer = FusedAdam(params, lr=0.1, compiled=compiled)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            params[0].grad = torch.randn(30, 40, generator=generator).t()
            params[1].grad = torch.randn((), generator=generator).expand(30)
            optimizer.step()
        assert all(float(optimizer.state[p]["step"]) == 3 for p in params)
        trained.append([p.detach() for p in params])
    assert loops == 3 * [1, 7]
    torch.testing.assert_close(*trained, rtol=1e-5, atol=1e-6)


@compiles
@pytest.mark.parametrize("what", ["exp_avg", "exp_avg_sq", "gradient", "negative"])
def test_what_torch_refuses_the_compiled_loop_refuses(what, loops):
    """It goes through memory: numbers of another type, or with a lazy sign, are others there."""
    params = parameters()[:1]
    optimizer = FusedAdam(params, compiled=True)
    train(optimizer, params, 1)
    loops.clear()
    (p,) = params
    if what == "gradient":
        p.grad_dtype = None
        p.grad = p.detach().double()
    elif what == "negative":
        p.grad = torch._neg_view(p.detach().clone())
    else:
        optimizer.state[p][what] = optimizer.state[p][what].double()
    with pytest.raises(RuntimeError):
        optimizer.step()
    assert not loops


@compiles
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gradient_that_turns_sparse_is_refused_and_nothing_changes(compiled):
    params = parameters()[:2]
    optimizer = FusedAdam(params, compiled=compiled)
    train(optimizer, params, 1)
    before = copy.deepcopy([params, optimizer.state_dict()])
    params[1].grad = params[1].grad.to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    torch.testing.assert_close([params, optimizer.state_dict()], before, rtol=0, atol=0)


@compiles
def test_a_compiled_optimiser_s_checkpoint_and_copy_go_on_alike():
    params = parameters()
    optimizer = FusedAdam(params, lr=0.01, compiled=True)
    train(optimizer, params, 3)
    copied = copy.deepcopy(optimizer)
    assert copied.compiled
    loaded = parameters()
    with torch.no_grad():
        for p, q in zip(loaded, params, strict=True):
            p.copy_(q)
    theirs = torch.optim.Adam(loaded, lr=0.5, fused=True)
    theirs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert theirs.param_groups[0].keys() == torch.optim.Adam(parameters(), fused=True).param_groups[0].keys()
    ours = copied.param_groups[0]["params"]
    train(optimizer, params, 3, seed=2)
    train(copied, ours, 3, seed=2)
    train(theirs, loaded, 3, seed=2)
    assert all(torch.equal(p, q) for p, q in zip(params, ours, strict=True))
    torch.testing.assert_close(params, loaded, rtol=1e-5, atol=1e-6)


def test_a_parameter_without_a_gradient_stays_and_starts_later():
    ours, theirs = both()
    for params, optimizer in (ours, theirs):
        train(optimizer, params, 2, without=(1, 3))
        assert params[1] not in optimizer.state or not optimizer.state[params[1]]
        train(optimizer, params, 2, without=(0,))
    assert_same(ours, theirs)
    assert [float(ours[1].state[p]["step"]) for p in ours[0]] == [2, 2, 4, 2]


def test_without_any_gradient_nothing_happens():
    params = parameters()
    FusedAdam(params).step()
    assert all(torch.equal(p, q) for p, q in zip(params, parameters(), strict=True))


@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_a_checkpoint_goes_both_ways(first):
    ours, theirs = both(lr=0.01)
    saved, loaded = (ours, theirs) if first == "ours" else (theirs, ours)
    whole = both(lr=0.01)[1]
    train(whole[1], whole[0], 3)
    train(whole[1], whole[0], 3, seed=2)
    train(saved[1], saved[0], 3)
    with torch.no_grad():
        for p, q in zip(loaded[0], saved[0], strict=True):
            p.copy_(q)
    loaded[1].load_state_dict(saved[1].state_dict())
    train(loaded[1], loaded[0], 3, seed=2)
    assert_same(loaded, whole)


def test_parameters_of_two_dtypes_are_updated_each_in_its_own():
    params = [*parameters(), *parameters(torch.float64)]
    train(FusedAdam(params, lr=0.1), params, 2)
    alone = parameters(torch.float64)
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(alone, lr=0.1, fused=True)
    for _ in range(2):
        drawn = [torch.randn(p.shape, generator=generator) for p in params]
        for p, gradient in zip(alone, drawn[len(alone) :], strict=True):
            p.grad = gradient.double()
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params[len(alone) :], alone, strict=True))


def test_a_closure_is_called_with_gradients_between_the_hooks():
    torch.optim.Adam(parameters(), fused=True)  # whose class then has hooks of its own
    params = parameters()
    optimizer = FusedAdam(params)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure():
        calls.append("closure")
        loss = sum((p**2).sum() for p in params)
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert calls == ["before", "closure", "after"]
    expected = sum((p.detach() ** 2).sum() for p in parameters())
    assert float(loss.detach()) == pytest.approx(float(expected))
    assert all(len(optimizer.state[p]) == 3 for p in params)


@pytest.mark.parametrize(
    "register",
    [
        FusedAdam.register_step_pre_hook,
        FusedAdam.register_step_post_hook,
        lambda _, hook: register_optimizer_step_pre_hook(hook),
        lambda _, hook: register_optimizer_step_post_hook(hook),
    ],
    ids=["before", "after", "before all", "after all"],
)
def test_a_hook_runs_once_a_step_until_it_is_removed(register):
    params = parameters()
    optimizer = FusedAdam(params)
    calls = []
    hook = register(optimizer, lambda which, *_: calls.append(which))
    try:
        train(optimizer, params, 2)
    finally:
        hook.remove()
    train(optimizer, params, 1)
    assert calls == [optimizer, optimizer]
    assert float(optimizer.state[params[0]]["step"]) == 3


@compiles
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("which", ["means", "gradient"])
def test_a_parameter_that_has_changed_its_size_is_refused(compiled, which):
    params = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(4))]
    optimizer = FusedAdam(params, compiled=compiled)
    train(optimizer, params, 1)
    params[1].data = torch.ones(5, 1)
    params[0].grad = torch.ones(3)
    if which == "means":
        params[1].grad = torch.ones(5, 1)
    before = copy.deepcopy([params, optimizer.state_dict()["state"]])
    with pytest.raises(
        ValueError, match=r"shape \(5, 1\), got.*means of shape \(4,\).*To fix: .*new optimiser"
    ):
        optimizer.step()
    torch.testing.assert_close([params, optimizer.state_dict()["state"]], before, rtol=0, atol=0)


@compiles
@pytest.mark.parametrize("compiled", [False, True])
def test_a_parameter_whose_strides_changed_is_updated_right(compiled):
    """Torch's fused Adam would pair its numbers with other ones' running means (2.15)."""
    ours, exact = parameters(), parameters()
    optimizers = FusedAdam(ours, lr=0.1, compiled=compiled), torch.optim.Adam(exact, lr=0.1, foreach=False)
    for params, optimizer in zip((ours, exact), optimizers, strict=True):
        train(optimizer, params, 2)
        for again in (lambda t: t.t().contiguous().t(), torch.Tensor.contiguous):
            params[0].data = again(params[0].data)
            params[0].grad = None
            train(optimizer, params, 2)
    torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-6)


def test_the_profiler_sees_a_step():
    params = parameters()
    optimizer = FusedAdam(params)
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, acc_events=True) as profile:  # without, torch 2.11 warns
        train(optimizer, params, 2)
    train(optimizer, params, 1)
    (step,) = (event for event in profile.key_averages() if event.key == "Optimizer.step#FusedAdam.step")
    assert step.count == 2


@compiles
def test_options_are_read_at_every_step_also_those_in_a_tensor():
    p, rate = torch.nn.Parameter(torch.zeros(3)), torch.tensor(0.5)
    optimizer = FusedAdam([p], lr=rate, betas=(0.0, 0.0), eps=1e-20, compiled=True)
    for number, expected in ((0.5, -0.5), (0.25, -0.75), (1.0, -1.75)):
        rate.fill_(number)
        p.grad = torch.ones(3)
        optimizer.step()  # by rate, since the mean is the gradient and the root of the square its size
        torch.testing.assert_close(p.detach(), torch.full((3,), expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize("slope", [1.0, torch.inf])
def test_a_scaled_gradient_is_scaled_back_and_an_infinite_one_is_skipped(slope):
    trained = []
    for make in (FusedAdam, torch.optim.Adam):
        params = parameters()
        optimizer, scaler = make(params, lr=0.1), torch.amp.GradScaler("cpu", init_scale=64.0)
        loss = slope * sum((p**3).sum() for p in params)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        trained.append([(p, optimizer.state[p].get("exp_avg")) for p in params])
    torch.testing.assert_close(*trained)
    moved = not torch.equal(trained[0][0][0], parameters()[0])
    assert moved == (slope == 1.0)


def test_a_gradient_may_have_any_strides():
    """Torch's fused kernel goes through the memory of parameter and gradient side by side."""
    trained = []
    for make in (FusedAdam, lambda params: torch.optim.Adam(params, foreach=False)):
        params = parameters()
        optimizer = make(params)
        generator = torch.Generator().manual_seed(2)
        for _ in range(2):
            params[0].grad = torch.randn(30, 40, generator=generator).t()
            params[1].grad = torch.randn((), generator=generator).expand(30)
            optimizer.step()
        trained.append(params)
    torch.testing.assert_close(*trained)


@compiles
@pytest.mark.parametrize("compiled", [False, True])
def test_a_checkpoint_may_have_any_strides(compiled):
    """Of a parameter that was a transposed one, say."""
    trained = []
    for transposed in (False, True):
        params = parameters()
        optimizer = FusedAdam(params, compiled=compiled)
        train(optimizer, params, 2)
        saved = copy.deepcopy(optimizer.state_dict())
        if transposed:
            for key in ("exp_avg", "exp_avg_sq"):
                saved["state"][0][key] = saved["state"][0][key].t().contiguous().t()
        optimizer.load_state_dict(saved)
        train(optimizer, params, 2, seed=2)
        trained.append(params)
    assert all(torch.equal(p, q) for p, q in zip(*trained, strict=True))


def test_a_checkpoint_of_other_shapes_is_refused_and_nothing_changes():
    params, others = parameters(), parameters()[::-1]
    optimizer, other = FusedAdam(params), FusedAdam(others, lr=0.5)
    train(optimizer, params, 1)
    train(other, others, 1)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(
        ValueError, match=r"mean of shape \(7, 1\) for a parameter of shape \(40, 30\)\. To fix: .*same order"
    ):
        optimizer.load_state_dict(other.state_dict())
    torch.testing.assert_close(optimizer.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("make", "option"),
    [
        (lambda params: torch.optim.Adam(params, amsgrad=True), "amsgrad"),
        (lambda params: torch.optim.Adam(params, maximize=True), "maximize"),
        (torch.optim.AdamW, "decoupled_weight_decay"),
    ],
    ids=["amsgrad", "maximize", "AdamW"],
)
def test_options_that_it_lacks_are_refused_and_nothing_changes(make, option):
    theirs, (ours, loaded) = parameters(), both()[0]
    optimizer = make(theirs)
    train(optimizer, theirs, 1)
    train(loaded, ours, 1)
    before = copy.deepcopy(loaded.state_dict())
    with pytest.raises(ValueError, match=f"got {option}\\. To fix: .*a torch optimiser that has it"):
        loaded.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match=f"without amsgrad.*, got {option}\\."):
        loaded.add_param_group({"params": parameters(), option: True})
    torch.testing.assert_close(loaded.state_dict(), before, rtol=0, atol=0)


def test_a_checkpoint_of_an_adam_that_is_not_fused():
    theirs, ours = parameters(), parameters()
    optimizer = torch.optim.Adam(theirs, lr=0.05)
    train(optimizer, theirs, 2)
    with torch.no_grad():
        for p, q in zip(ours, theirs, strict=True):
            p.copy_(q)
    loaded = FusedAdam(ours)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert loaded.param_groups[0]["fused"]
    train(optimizer, theirs, 2, seed=3)
    train(loaded, ours, 2, seed=3)
    torch.testing.assert_close(ours, theirs)


def test_svi_trains_by_it_as_by_torch_s():
    losses = []
    for optimizer in (None, torch.optim.Adam):
        torch.manual_seed(0)
        model, guide = pair()
        if optimizer is None:
            made = pyro.optim.Adam({"lr": 0.01})
        else:
            made = optimizer(pv.parameters(model, guide), lr=0.01, fused=True)
        svi = pv.SVI(model, guide, made, loss=Trace_ELBO())
        assert isinstance(svi.optimizer, FusedAdam) == (optimizer is None)
        losses.append([svi.step(data()) for _ in range(5)])
    assert losses[0] == losses[1]


@compiles
@pytest.mark.parametrize(("backend", "compiled"), [("inductor", True), ("eager", False)])
def test_svi_compiles_its_adam_where_it_compiles_its_loss(backend, compiled):
    loss = pv.CompiledELBO(Trace_ELBO(), backend=backend)
    assert pv.SVI(*pair(), pyro.optim.Adam({"lr": 0.01}), loss=loss).optimizer.compiled is compiled
    assert not pv.SVI(*pair(), pyro.optim.Adam({"lr": 0.01}), loss=Trace_ELBO()).optimizer.compiled


@compiles
def test_without_a_compiler_the_error_says_what_to_do(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("No working C++ compiler found. Look for one")

    monkeypatch.setattr("torch._inductor.codecache.CppCodeCache.load_async", fail)
    cpp_kernels.start_compiling.cache_clear()
    expected = (
        "compile adam.cpp, got an error: No working C\\+\\+ compiler found\\. "
        ".*To fix: install one.*backend='eager'"
    )
    with pytest.raises(ValueError, match=expected):
        cpp_kernels.start_compiling("adam.cpp")
    params = parameters()
    with pytest.raises(ValueError, match=expected):
        FusedAdam(params, compiled=True)
