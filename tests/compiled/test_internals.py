"""Private names of torch and Pyro: without each, the next slower way is taken, or an error names it."""

import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import pyro.infer.util
import pytest
import torch
import torch._inductor
from compiled_steps import ELBOS, Normed, adam, replayed
from pyro.infer import Trace_ELBO
from registry import data, each_once, pair
from torch.fx.experimental import proxy_tensor
from torch.nn.modules import module as torch_module

import pyro_vae as pv
from pyro_vae.compiled import internals, products


@pytest.fixture
def fresh():
    """Ask torch again what it has."""
    cached = internals.onednn_linear, internals.multiplies_bfloat16, products._onednn_is_faster
    for each in cached:
        each.cache_clear()
    yield
    for each in cached:
        each.cache_clear()


def first_losses(elbo):
    torch.manual_seed(0)
    svi = pv.SVI(*pair(width=64, hidden=40), adam(), loss=elbo)
    return [svi.step(data(width=64, size=48)) for _ in range(3)]


@pytest.mark.parametrize("name", ["compile", "list_options"])
def test_without_a_compiler_of_graphs_they_are_replayed(name, monkeypatch):
    monkeypatch.delattr(torch._inductor, name)
    with pytest.warns(UserWarning, match="no torch._inductor.compile, so graphs are replayed"):
        found = first_losses(pv.CompiledELBO(Trace_ELBO()))
    assert found == pytest.approx(first_losses(Trace_ELBO()), rel=1e-5)


def test_without_make_fx_the_error_names_it(monkeypatch):
    monkeypatch.delattr(proxy_tensor, "make_fx")
    with pytest.raises(
        ValueError, match="expected make_fx in torch, got torch .* To fix: use the ELBO alone"
    ):
        first_losses(replayed(Trace_ELBO()))


class NoOperations:
    """Operations of a torch without oneDNN."""

    def __getattr__(self, name):
        raise AttributeError(name)


@pytest.mark.parametrize("built", [True, False])
@pytest.mark.usefixtures("fresh")
def test_without_onednn_products_stay_with_torch(built, monkeypatch, recwarn):
    monkeypatch.setattr(torch.ops, "mkldnn", NoOperations(), raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: built)
    found = first_losses(replayed(Trace_ELBO()))
    assert found == pytest.approx(first_losses(Trace_ELBO()), rel=1e-5)
    # A torch that was built without it lacks nothing that it had.
    expected = built and torch.backends.cpu.get_cpu_capability() == "AVX512"
    assert [str(each.message) for each in recwarn if "_linear_pointwise" in str(each.message)] == (
        [str(recwarn[0].message)] if expected else []
    )


class Sources:
    """The sources of torch.fx, kept under another name."""

    def __init__(self, loader):
        self.cache = loader.cache


@pytest.mark.parametrize("name", ["_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"])
def test_an_optimiser_whose_hooks_are_not_seen_may_have_some(name):
    optimizer = torch.optim.Adam(pair()[1].parameters(), fused=True)
    assert not internals.hooks_on_step(optimizer)
    delattr(optimizer, name)
    assert internals.hooks_on_step(optimizer)


@pytest.mark.parametrize("name", ["_global_optimizer_pre_hooks", "_global_optimizer_post_hooks"])
def test_a_torch_whose_hooks_on_all_optimisers_are_not_seen_may_have_some(name, monkeypatch):
    monkeypatch.delattr(sys.modules["torch.optim.optimizer"], name)
    assert internals.hooks_on_step(torch.optim.SGD(pair()[1].parameters()))


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
def test_only_torch_s_fused_optimisers_skip_and_their_copies_too(kind):
    class Own(kind):
        pass

    def weights():
        return list(pair()[1].parameters())

    optimizer = kind(weights(), lr=0.1, fused=True)
    for each in (optimizer, copy.deepcopy(optimizer)):
        assert internals.skips_on_request(each)
        before, each.found_inf = [p.clone() for p in each.param_groups[0]["params"]], torch.ones(())
        for p in each.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        each.step()
        torch.testing.assert_close(each.param_groups[0]["params"], before, rtol=0, atol=0)
    assert not internals.skips_on_request(kind(weights(), lr=0.1))
    assert not internals.skips_on_request(Own(weights(), lr=0.1, fused=True))


@pytest.mark.parametrize("missing", [False, True])
def test_copies_of_tensors(missing, monkeypatch):
    if missing:
        monkeypatch.delattr(torch, "_foreach_clone", raising=False)
    tensors = [torch.randn(2, 3).t(), torch.tensor(True), torch.tensor([torch.nan, -0.0])]
    copied = internals.copies(tensors)
    torch.testing.assert_close(copied, tensors, rtol=0, atol=0, equal_nan=True)
    for tensor, copied_tensor in zip(tensors, copied, strict=True):
        assert copied_tensor.stride() == tensor.stride()
        assert copied_tensor.data_ptr() != tensor.data_ptr()


def test_without_the_kept_sources_a_step_is_the_same(monkeypatch):
    expected = first_losses(Trace_ELBO())
    monkeypatch.setattr(torch.fx.graph_module, "_loader", Sources(torch.fx.graph_module._loader))
    assert first_losses(replayed(Trace_ELBO())) == pytest.approx(expected, rel=1e-5)


def fake_modes():
    with internals.one_fake_mode():
        graph = internals.recorder()(lambda x: (x.exp() + 1).sum())(torch.ones(3)).graph
    return {id(node.meta["val"].fake_mode) for node in graph.nodes if node.op == "call_function"}


def test_the_results_of_a_recording_share_a_fake_mode():
    assert len(fake_modes()) == 1


@pytest.mark.parametrize("name", ["_guards.TracingContext", "_subclasses.fake_tensor.FakeTensorMode"])
def test_without_a_shared_fake_mode_a_recording_makes_its_own(name, monkeypatch):
    owner, name = name.rsplit(".", 1)
    monkeypatch.delattr(sys.modules[f"torch.{owner}"], name)
    with internals.one_fake_mode():
        monkeypatch.undo()  # make_fx itself takes both names
        assert torch._guards.TracingContext.try_get() is None


@pytest.mark.parametrize("name", ["_backward_hooks", "_post_accumulate_grad_hooks"])
def test_a_torch_whose_hooks_on_parameters_are_not_seen_is_refused(name, monkeypatch):
    missing = property(lambda tensor: (_ for _ in ()).throw(AttributeError(name)))
    monkeypatch.setattr(torch.nn.Parameter, name, missing, raising=False)
    with pytest.raises(ValueError, match=f"expected to see hooks, got torch .* without .'{name}'.*To fix"):
        first_losses(replayed(Trace_ELBO()))


@pytest.mark.parametrize("kind", sorted(internals.MODULE_HOOKS))
def test_a_torch_whose_hooks_on_modules_are_not_seen_is_refused(kind, monkeypatch):
    monkeypatch.delattr(torch_module, f"_global{kind}")
    with pytest.raises(ValueError, match=f"expected to see hooks, got torch .* without .'_global{kind}'"):
        internals.check_hooks_are_seen()


def test_options_that_the_compiler_does_not_know_are_left_out(monkeypatch):
    given = []
    monkeypatch.setattr(torch._inductor, "list_options", lambda: ["fallback_random"])
    monkeypatch.setattr(torch._inductor, "compile", lambda *each: given.append(each))
    internals.compile_graph("graph", [], on_cuda=False)
    assert given == [("graph", [], {"fallback_random": True})]


@pytest.mark.parametrize(
    ("owner", "name"), [(torch._C, "_get_tracing_state"), (pyro.infer.util.Dice, "compute_expectation")]
)
def test_what_pyro_no_longer_has_is_not_patched(owner, name, monkeypatch):
    held = getattr(owner, name)
    monkeypatch.delattr(owner, name)
    with internals.reading_nothing():
        assert not hasattr(owner, name)
    assert not hasattr(owner, name)
    setattr(owner, name, held)


def patched():
    """The values of all that a capture patches."""
    modules = [each for name, each in sorted(sys.modules.items()) if name.startswith("pyro.infer")]
    return [
        torch._C._get_tracing_state,
        pyro.infer.util.Dice.compute_expectation,
        torch.Tensor.masked_select,
        *(vars(module).get("warn_if_nan") for module in modules),
        torch.is_autocast_cache_enabled(),
        pyro.infer.util.is_validation_enabled(),
        len(torch.fx.graph_module._loader.eval_cache),
    ]


@pytest.mark.parametrize(
    ("elbo", "run", "error"), each_once(["trace", "graph"], [1, 2, 4, 6], [KeyboardInterrupt, RuntimeError])
)
def test_an_interrupted_capture_leaves_no_patch_behind(elbo, run, error):
    programs = pair()[0], Normed()
    network, runs = programs[1].net[0], []

    def interrupted(x):
        runs.append(x)
        if len(runs) == run:
            raise error
        return type(network).forward(network, x)

    x, svi = data(size=16), pv.SVI(*programs, adam(), loss=replayed(ELBOS[elbo]()))
    svi.evaluate_loss(x)
    before = patched()
    network.forward = interrupted
    state, values = torch.get_rng_state(), programs[1].state_dict()
    values = {name: value.clone() for name, value in values.items()}
    try:
        svi.step(x)
        finished = True
    except (error, ValueError):
        finished = False
    assert patched() == before
    assert finished == (len(runs) < run)
    if not finished:
        assert torch.equal(torch.get_rng_state(), state)
        torch.testing.assert_close(programs[1].state_dict(), values, rtol=0, atol=0)


def test_private_names_of_torch_stand_in_one_file():
    private = re.compile(r"\btorch\._\w+|from torch\.\S*\b_\w+ import|_inductor|fx\.experimental|ops\.mkldnn")
    package = Path(pv.__file__).parent
    found = {
        (file.relative_to(package).as_posix(), name)
        for file in package.rglob("*.py")
        for name in private.findall(file.read_text())
        if file.name != "internals.py"
    }
    assert found == {("programs/snapshot.py", "torch._C")}  # torch._C.DisableTorchFunction, in torch's manual


WITHOUT = """
import sys, torch
import torch._ops
found = torch._ops._OpNamespace.__getattr__
def missing(self, name):
    if self.name == "mkldnn":
        raise AttributeError(name)
    return found(self, name)
torch._ops._OpNamespace.__getattr__ = missing
torch.backends.mkldnn.is_available = lambda: False
import pyro, pyro_vae as pv
from pyro.infer import Trace_ELBO
from torch import nn
sys.stderr = None
torch.manual_seed(0)
model = pv.Model(pv.StandardNormal(2), nn.Sequential(pv.MLP(2, 20, 64), pv.Bernoulli()))
guide = pv.Guide(nn.Sequential(pv.MLP(64, 20, 4), pv.DiagNormal()))
x = (torch.rand(32, 64) > 0.5).float()
for loss in (Trace_ELBO(), pv.CompiledELBO(Trace_ELBO(), backend="eager")):
    svi = pv.SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), loss=loss)
    for epoch in pv.fit(svi, [x, x], 2):
        print(epoch)
print(float(pv.log_evidence(model, guide, x, 10).mean()))
svi = pv.SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), loss=pv.CompiledELBO(Trace_ELBO()))
try:
    svi.step(x)
except ValueError as error:
    print(error)
"""


def test_without_onednn_a_compiler_and_stderr_a_pair_trains_evaluates_and_replays(tmp_path):
    env = {**os.environ, "PATH": "", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    env.pop("CXX", None)
    run = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, env=env, check=True)
    *epochs, evidence, error = run.stdout.splitlines()
    assert len(epochs) == 4
    assert float(evidence) < 0
    assert error.startswith("torch's compiler: expected to compile this graph, got an error:")
    assert "backend='eager'" in error


LOADED = """
import sys, pyro_vae as pv
slow = "torch._inductor", "torch._dynamo", "matplotlib", "torchvision", "pyro_vae.compiled", "pyro_vae.plots"
print([name for name in slow if name in sys.modules])
pv.data.Batches, pv.data.observe
print([name for name in slow if name in sys.modules])
print(pv.plots.images.__name__, pv.CompiledELBO.__name__, {"plots", "CompiledELBO"} <= set(dir(pv)))
from pyro_vae import CompiledELBO, plots
try:
    pv.Compiled
except AttributeError as error:
    print(error)
"""


def test_an_import_loads_neither_the_compiler_nor_pictures_nor_torchvision():
    run = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == [
        "[]",
        "[]",
        "images CompiledELBO True",
        "module 'pyro_vae' has no attribute 'Compiled'",
    ]
