"""The errors of CompiledELBO that are not about the capture."""

import copy

import pyro
import pytest
import torch
from compiled_steps import Sharp, adam, replayed
from pyro.infer import Trace_ELBO, TraceGraph_ELBO
from registry import data, pair

import pyro_vae as pv


@pytest.mark.parametrize("elbo", [None, Trace_ELBO, pv.CompiledELBO(Trace_ELBO())])
def test_only_an_elbo_is_compiled(elbo):
    with pytest.raises(ValueError, match="expected a Pyro ELBO, got"):
        pv.CompiledELBO(elbo)


def test_a_backend_is_one_of_two():
    with pytest.raises(ValueError, match="backend: expected 'inductor' or 'eager', got 'tensorrt'"):
        pv.CompiledELBO(Trace_ELBO(), backend="tensorrt")


def test_without_a_compiler_the_error_says_what_to_do_and_nothing_changes(monkeypatch):
    def fail(*_):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found")

    monkeypatch.setattr("torch._inductor.compile", fail)
    programs, x = pair(), data()
    before = copy.deepcopy([p.state_dict() for p in programs])
    svi = pv.SVI(*programs, adam(), loss=pv.CompiledELBO(Trace_ELBO()))
    state = torch.get_rng_state()
    for _ in range(2):
        with pytest.raises(
            ValueError, match="No working C\\+\\+ compiler.*To fix: install one.*backend='eager'"
        ):
            svi.step(x)
    assert torch.equal(torch.get_rng_state(), state)
    for program, values in zip(programs, before, strict=True):
        torch.testing.assert_close(program.state_dict(), values, rtol=0, atol=0)


def test_an_unsafe_cache_folder_is_refused_before_anything_is_compiled(monkeypatch, tmp_path):
    monkeypatch.setattr("torch._inductor.compile", lambda *_: pytest.fail("compiled"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "a b"))
    svi = pv.SVI(*pair(), adam(), loss=pv.CompiledELBO(Trace_ELBO()))
    with pytest.raises(ValueError, match="torch's cache folder: expected a path without spaces"):
        svi.step(data())


def test_a_bad_value_is_found_in_a_compiled_step():
    programs = pair()
    svi = pv.SVI(*programs, adam(), loss=replayed(Trace_ELBO()))
    x = data()
    svi.step(x)
    before = copy.deepcopy([module.state_dict() for module in programs])
    bad = x.clone()
    bad[0, 0] = 0.5
    for method in (svi.step, svi.evaluate_loss):
        with pytest.raises(ValueError, match="'x'.*outside its support in 1 of"):
            method(bad)
    after = [module.state_dict() for module in programs]
    torch.testing.assert_close(before, after, rtol=0, atol=0)


def test_a_gradient_that_is_not_finite_stops_a_compiled_step():
    model, guide = Sharp(lambda w: (w * w).sqrt()), pair()[1]  # whose slope at 0 is NaN
    x = data()
    model.w.data.fill_(1.0)
    elbo = replayed(Trace_ELBO())
    svi = pv.SVI(model, guide, adam(), loss=elbo)
    svi.step(x)
    svi.optimizer.zero_grad()
    model.w.data.zero_()
    before = copy.deepcopy((model.state_dict(), guide.state_dict(), svi.optimizer.state_dict()["state"]))
    with pytest.raises(ValueError, match="A gradient is not finite.*site 'x' of the model, Normal"):
        svi.step(x)
    with pytest.raises(FloatingPointError, match="A gradient is not finite") as caught:
        elbo.loss_and_grads(model, guide, x)
    assert "pyro_vae.SVI, which names the site" in caught.value.__notes__[0]
    assert all(p.grad is None for p in pv.parameters(model, guide))
    after = model.state_dict(), guide.state_dict(), svi.optimizer.state_dict()["state"]
    torch.testing.assert_close(before, after, rtol=0, atol=0)


def test_a_second_pair_in_pyro_s_store_is_refused():
    elbo = replayed(Trace_ELBO())
    x = data()
    pyro.infer.SVI(*pair(), adam(), loss=elbo).step(x)
    with pytest.raises(
        ValueError,
        match="all parameters of this pair in Pyro's store, got.*would not train all.*clear_param_store",
    ):
        pyro.infer.SVI(*pair(), adam(), loss=elbo).step(x)


def test_a_program_inside_ddp_is_refused_in_words():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        programs = [torch.nn.parallel.DistributedDataParallel(program) for program in pair()]
        trained = [p for program in programs for p in program.parameters()]
        svi = pv.SVI(*programs, torch.optim.Adam(trained), loss=Trace_ELBO())
        assert svi.step(data()) > 0
        svi = pv.SVI(*programs, torch.optim.Adam(trained), loss=replayed(Trace_ELBO()))
        with pytest.raises(ValueError, match="no DistributedDataParallel around.*register_step_pre_hook"):
            svi.step(data())
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # from torch.compile itself
@pytest.mark.parametrize("whole", [True, False])
def test_a_module_of_torch_compile_is_refused_in_words(whole):
    model, guide = pair()
    if whole:
        guide.encoder = torch.compile(guide.encoder, backend="eager")
    else:
        guide.encoder.compile(backend="eager")
    assert pv.SVI(model, guide, adam(), loss=Trace_ELBO()).step(data()) > 0
    svi = pv.SVI(model, guide, adam(), loss=replayed(Trace_ELBO()))
    kind = type(getattr(guide.encoder, "_orig_mod", guide.encoder)).__name__
    with pytest.raises(ValueError, match=f"no module compiled by torch.compile in a graph, got {kind}. "):
        svi.step(data())


@pytest.mark.parametrize("prior", ["mixture", "vamp"])
def test_a_loss_of_trace_graph_elbo_under_a_prior_without_rsample_is_captured(prior):
    """It tracks the draws of such a prior by tensors of its own."""
    model, guide = pair()
    if prior == "mixture":
        model = pv.Model(pv.MixturePrior(2, 3), model.decoder)
    else:
        model = pv.Model(pv.VampPrior(guide.encoder, data()[:3]), model.decoder)
    found = []
    for elbo in (TraceGraph_ELBO(), replayed(TraceGraph_ELBO())):
        svi = pv.SVI(model, guide, adam(0.0), loss=elbo)
        torch.manual_seed(0)
        found.append([svi.evaluate_loss(data()), svi.step(data()), svi.evaluate_loss(data())])
    assert found[0] == pytest.approx(found[1], rel=1e-6)


@pytest.mark.parametrize("layout", ["slices", "transposed", "expanded"])
@pytest.mark.parametrize("mean", [1.0, 1e4])
def test_batch_norm_of_nearly_constant_data_is_captured(mean, layout):
    """It divides by a standard deviation near 0, which enlarges a rounding error by far."""
    x = mean + 1e-3 * torch.randn(64, 6)
    if layout == "slices":
        x = torch.stack([x, x], -1)[..., 0]
    elif layout == "transposed":
        x = x.t().contiguous().t()
    else:
        x = x[:1].expand(64, 6)
    guide = pv.Guide(torch.nn.Sequential(torch.nn.BatchNorm1d(6), pv.MLP(6, 8, 4), pv.DiagNormal()))
    elbo = replayed(Trace_ELBO())
    assert elbo.loss_and_grads(pair("gaussian")[0], guide, x) > 0
    assert elbo.num_graphs == 1
