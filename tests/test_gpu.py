"""On a GPU: the numbers of a closed form, and a compiled step as a CUDA graph."""

import copy
from itertools import pairwise

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.nn import PyroModule
from registry import LIKELIHOODS, data, pair
from torch import nn

import pyro_vae as pv
from pyro_vae.evaluation import references
from pyro_vae.training import ahead

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),  # torch 2.11's compiler uses what torch deprecates
]

ELBOS = {"trace": Trace_ELBO, "mean-field": TraceMeanField_ELBO}


def adam(lr=1e-2):
    return pyro.optim.Adam({"lr": lr})


def moved(programs, device="cuda"):
    return tuple(program.to(device) for program in programs)


def numbers(programs):
    return [program.state_dict() for program in programs]


def launches(function, times=5):
    """Return how many kernels and how many CUDA graphs one call of a function launches."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(times):
            function()
        torch.cuda.synchronize()
    counts = {event.key: event.count / times for event in profile.key_averages()}
    kernels = counts.get("cudaLaunchKernel", 0) + counts.get("cuLaunchKernel", 0)
    return kernels, counts.get("cudaGraphLaunch", 0)


@pytest.mark.parametrize("elbo", ELBOS)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_fifty_replayed_steps_are_those_of_eager(likelihood, elbo):
    programs = moved(pair(likelihood))
    twins = copy.deepcopy(programs)
    x = data(likelihood, 16).cuda()
    losses = []
    for each, loss in (
        (programs, ELBOS[elbo]()),
        (twins, pv.CompiledELBO(ELBOS[elbo](), backend="eager")),
    ):
        svi = pv.SVI(*each, adam(), loss=loss)
        torch.manual_seed(1)
        losses.append([svi.step(x) for _ in range(50)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4, abs=1e-3)
    torch.testing.assert_close(numbers(programs), numbers(twins), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("elbo", ELBOS)
def test_a_compiled_loss_and_its_gradient_are_unbiased(elbo):
    """Within five standard errors of the closed form; without the KL, say, they would be far away."""
    programs = moved(references.linear_gaussian())
    x = torch.randn(4, 5, dtype=torch.float64).cuda()
    exact = -references.elbo(*programs, x).sum()
    trained = pv.parameters(*programs)
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(exact, trained)])
    svi = pv.SVI(*programs, torch.optim.SGD(trained, lr=0.0), loss=pv.CompiledELBO(ELBOS[elbo]()))
    losses, gradients = [], []
    for _ in range(2000):
        losses.append(svi.step(x))
        gradients.append(torch.cat([p.grad.flatten() for p in trained]))
    found = torch.stack([torch.tensor(losses).cuda().double(), *torch.stack(gradients).T])
    error = found.std(1) / len(losses) ** 0.5
    exact = torch.cat([exact.detach().reshape(1), expected])
    assert ((found.mean(1) - exact).abs() <= 5 * error + 1e-9).all()
    kl = references.kl(programs[1], x).sum()
    assert kl > 10 * error[0]


def wide_svi(loss, size=128, options=()):
    programs = moved(pair(width=784, dim=20, hidden=400))
    x = data(width=784, size=size).cuda()
    return pv.SVI(*programs, adam(1e-3), loss=pv.CompiledELBO(loss, **dict(options))), x


def test_a_compiled_step_is_a_cuda_graph_and_little_else():
    svi, x = wide_svi(TraceMeanField_ELBO())
    for _ in range(5):
        svi.step(x)
    kernels, graphs = launches(lambda: svi.step(x))
    assert graphs == 1
    assert kernels <= 10  # the inputs are copied, and Adam comes after
    replayed, x = wide_svi(TraceMeanField_ELBO(), options={"backend": "eager"})
    for _ in range(5):
        replayed.step(x)
    assert launches(lambda: replayed.step(x))[0] > 3 * kernels


def test_memory_does_not_grow_with_steps_of_two_sizes():
    svi, x = wide_svi(Trace_ELBO())
    seen = []
    for step in range(120):
        svi.step(x)
        svi.step(x[:50])  # compiled at its twentieth step
        if step >= 60 and step % 10 == 0:
            torch.cuda.synchronize()
            seen.append(torch.cuda.memory_allocated())
    assert max(seen) == min(seen)


def test_gradients_that_live_stop_no_other_graph():
    first, x = wide_svi(Trace_ELBO())
    second, _ = wide_svi(Trace_ELBO())
    for svi in (first, second):
        for _ in range(5):
            svi.step(x)
    for svi in (second, first):
        assert launches(lambda svi=svi: svi.step(x))[1] == 1


def test_gradients_that_are_kept_stay_as_they_were():
    svi, x = wide_svi(Trace_ELBO())
    p = pv.parameters(svi.model, svi.guide)[0]
    kept, copies = [], []
    for _ in range(8):
        svi.step(x)
        kept.append(p.grad)
        copies.append(p.grad.clone())
    torch.testing.assert_close(kept, copies, rtol=0, atol=0)
    assert all(not torch.equal(a, b) for a, b in pairwise(kept))


def test_gradients_add_up():
    programs = moved(pair(width=64, hidden=40))
    x = data(width=64, size=32).cuda()
    elbo = pv.CompiledELBO(TraceMeanField_ELBO())
    trained = pv.parameters(*programs)
    for _ in range(4):  # of these the first warms up, and the second is recorded
        for p in trained:
            p.grad = None
        torch.manual_seed(0)
        elbo.loss_and_grads(*programs, x)
        once = [p.grad.clone() for p in trained]
        torch.manual_seed(0)
        elbo.loss_and_grads(*programs, x)
        torch.testing.assert_close([p.grad for p in trained], [2 * g for g in once])


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_the_same_seed_gives_the_same_training(backend):
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        svi, x = wide_svi(Trace_ELBO(), options={"backend": backend})
        torch.manual_seed(2)
        found.append([svi.step(x) for _ in range(10)])
    assert found[0] == found[1]
    assert len(set(found[0])) == 10


def test_training_under_pyro_s_svi():
    programs = moved(pair(width=784, dim=20, hidden=400))
    x = data(width=784, size=64).cuda()
    svi = pyro.infer.SVI(*programs, adam(1e-3), loss=pv.CompiledELBO(TraceMeanField_ELBO()))
    losses = [svi.step(x) for _ in range(100)]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


class Normed(PyroModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4), pv.DiagNormal())

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.net(x))


def test_batch_norm_s_statistics_are_updated():
    programs = moved((pair()[0], Normed()))
    twins = copy.deepcopy(programs)
    x = data(size=16).cuda()
    for each, loss in ((programs, Trace_ELBO()), (twins, pv.CompiledELBO(Trace_ELBO()))):
        svi = pv.SVI(*each, adam(0.0), loss=loss)
        for _ in range(6):
            svi.step(x)
    ours, theirs = (each[1].net[1].state_dict() for each in (programs, twins))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert theirs["num_batches_tracked"] == 6


def test_what_is_not_finite_changes_nothing_and_names_the_site():
    svi, x = wide_svi(TraceMeanField_ELBO())
    for _ in range(4):
        svi.step(x)
    bad = x.clone()
    bad[0, 0] = 0.5
    before = copy.deepcopy((numbers((svi.model, svi.guide)), svi.optimizer.state_dict()["state"]))
    state = torch.cuda.get_rng_state()
    with pytest.raises(ValueError, match="'x'.*outside its support in 1 of"):
        svi.step(bad)
    after = numbers((svi.model, svi.guide)), svi.optimizer.state_dict()["state"]
    torch.testing.assert_close(before, after, rtol=0, atol=0)
    assert torch.equal(torch.cuda.get_rng_state(), state)


@pytest.mark.parametrize("reduce", ["autocast", "tf32"])
def test_reduced_precision_is_read_at_every_step(reduce):
    svi, x = wide_svi(TraceMeanField_ELBO())
    svi.optimizer.param_groups[0]["lr"] = 0.0

    def gradient(reduced):
        try:
            if reduced and reduce == "tf32":
                torch.set_float32_matmul_precision("high")
            with torch.autocast("cuda", torch.bfloat16, enabled=reduced and reduce == "autocast"):
                for _ in range(3):
                    svi.step(x)  # until it is replayed
                torch.manual_seed(0)
                svi.step(x)
            return next(svi.guide.parameters()).grad.clone()
        finally:
            torch.set_float32_matmul_precision("highest")

    full, reduced, again = gradient(False), gradient(True), gradient(False)
    torch.testing.assert_close(full, again)
    error = (reduced - full).norm() / full.norm()
    assert 1e-5 < error < 0.05
    assert reduced.dtype is torch.float32


def test_a_kl_weight_is_an_input_of_the_graph():
    programs = moved(pair())
    x = data().cuda()
    plain, compiled = TraceMeanField_ELBO(), pv.CompiledELBO(TraceMeanField_ELBO())
    svi = pv.SVI(*programs, adam(0.0), loss=compiled)
    with torch.no_grad():
        for p in programs[0].parameters():
            p.zero_()  # then the loss is not random
    for beta in (0.0, 0.5, 1.0, 2.0):
        with pv.scale_latents(beta):
            assert svi.step(x) == pytest.approx(plain.loss(*programs, x), rel=1e-4)
    assert compiled.num_graphs == 1


@pytest.mark.parametrize("compiled", [False, True])
def test_log_evidence_is_that_of_the_closed_form(compiled):
    programs = moved(references.linear_gaussian(dim=1))
    x = torch.randn(300, 5, dtype=torch.float64).cuda()
    references.set_to_posterior(*programs, spread=1.2)
    exact = references.evidence(programs[0], x)
    found = pv.log_evidence(*programs, x, 2000, compiled=compiled)
    assert found.values.is_cuda
    assert ((found.values - exact).abs() <= 6 * found.standard_error).all()


@pytest.mark.usefixtures("few")
def test_batches_do_not_wait_for_the_device():
    batches = pv.data.Batches(pv.data.load(), pv.data.DynamicBinarisation(), batch_size=16, device="cuda")
    next(iter(batches))
    epoch = iter(batches)
    first = next(epoch)  # the order of an epoch comes from the CPU
    torch.cuda.set_sync_debug_mode("error")
    try:
        rest = list(epoch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert set(torch.cat([first, *rest]).unique().tolist()) == {0.0, 1.0}


def test_random_bytes_are_uniform_and_never_255():
    u = pv.data._uniform_bytes(torch.empty(4001, 4001, dtype=torch.uint8, device="cuda"), None)
    counts = torch.bincount(u.flatten().long(), minlength=256)
    assert counts[255] == 0
    expected = u.numel() / 255
    assert (counts[:255] - expected).abs().max() < 5 * expected**0.5


def test_batches_and_fit_on_a_gpu(few):
    train = pv.data.load()
    batches = pv.data.Batches(train, pv.data.DynamicBinarisation(), 100, device="cuda")
    svi, _ = wide_svi(TraceMeanField_ELBO())
    epochs = list(pv.fit(svi, batches, 5, progress=False))
    assert epochs[-1].elbo > epochs[0].elbo
    assert next(iter(batches)).is_cuda


def test_a_training_does_not_wait_for_its_steps():
    svi, x = wide_svi(TraceMeanField_ELBO())
    steps = ahead.StepsAhead(svi, 0.0)
    for _ in range(30):  # compiled, and recorded as a CUDA graph
        steps.take((x,))
    before = steps.settle()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(40):
            steps.take((x,))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert 0 < steps.settle() - before < before * 40 / 30  # it trains


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_steps_ahead_are_those_that_wait(backend, monkeypatch):
    found = []
    for device in ("cuda", "none"):
        monkeypatch.setattr(ahead, "DEVICE", device)
        torch.manual_seed(0)
        svi, x = wide_svi(TraceMeanField_ELBO(), options={"backend": backend})
        torch.manual_seed(1)
        losses = [epoch.loss for epoch in pv.fit(svi, [x] * 120, 2, progress=False)]
        found.append((losses, numbers((svi.model, svi.guide))))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_bad_step_among_those_ahead_is_named_and_not_applied(backend):
    svi, x = wide_svi(TraceMeanField_ELBO(), options={"backend": backend})
    given = [x] * 70
    list(pv.fit(svi, given[:30], 1, progress=False))
    kept = copy.deepcopy(svi)
    torch.manual_seed(1)
    list(pv.fit(kept, given[:20], 1, progress=False))
    given[20] = x * torch.nan
    torch.manual_seed(1)
    with pytest.raises(ValueError, match="site '.' of the guide.*NaN"):
        list(pv.fit(svi, given, 1, progress=False))
    expected, after = numbers((kept.model, kept.guide)), numbers((svi.model, svi.guide))
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4)
