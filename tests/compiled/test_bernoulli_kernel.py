"""The Bernoulli likelihood in one pass: the numbers of the two passes, wherever a graph has them."""

import math

import pyro
import pytest
import torch
from compiled_steps import captured_step
from product_graphs import count_calls, num_threads
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from registry import data, pair
from torch._inductor import config
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import binary_cross_entropy_with_logits

import pyro_vae as pv
from pyro_vae.compiled.cpu import bernoulli_kernel
from pyro_vae.compiled.cpu.bernoulli_kernel import compute_bernoulli_in_one_pass
from pyro_vae.distributions.densities import BernoulliDistribution, IndependentBernoulli

pytestmark = [
    pytest.mark.skipif(not bernoulli_kernel._kernel_compiles(), reason="no C++ compiler"),
    pytest.mark.filterwarnings("default"),  # torch 2.11's compiler uses what torch deprecates
]
EPSILON = 2**-24


def kernel(x, logits, slopes=True):
    """Log probabilities and slopes, and a guard behind them that must stay NaN."""
    rows = logits[..., 0].numel()
    out = torch.full((rows + slopes * logits.numel() + 16,), torch.nan)
    bernoulli_kernel._write_totals_and_slopes(x, logits, out=out[:-16])
    assert out[-16:].isnan().all()
    return out[:rows], out[rows:-16].view(logits.shape if slopes else 0)


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 7, 8, 17, 48, 784, 896, 897, 2500])
def test_it_is_the_closed_form(size, number):
    torch.manual_seed(0)
    x, logits = torch.rand(50, size).round(), 30 * torch.randn(50, size) ** 3
    special = torch.tensor([0.0, -0.0, 1e-30, -1e-5, 87.3, -87.4, 1e4, -3e38])[:size]
    logits[3, : len(special)] = special
    with num_threads(number):
        total, slope = kernel(x, logits)
        alone, _ = kernel(x, logits, slopes=False)
    assert torch.equal(total, alone)
    terms = -binary_cross_entropy_with_logits(logits.double(), x.double(), reduction="none")
    # Each factor is off by some units in the last place, each partial sum by one.
    bound = size * (8 * EPSILON + EPSILON * terms.abs().sum(-1))
    assert ((total - terms.sum(-1)).abs() <= bound).all()
    # Where x is 0, to the last digits also of a tiny sigmoid, down to the smallest normal float.
    sigmoid = logits.double().sigmoid()
    assert ((slope - (x - sigmoid)).abs() <= 8 * EPSILON * (x + sigmoid) + 2**-125).all()


@pytest.mark.parametrize("size", [2000, 20_000])
def test_the_product_of_a_long_row_does_not_overflow(size):
    x = torch.zeros(2, size)
    total, _ = kernel(x, x, slopes=False)  # each factor is 2, the largest that there is
    torch.testing.assert_close(total, torch.full((2,), -size * math.log(2)))


@pytest.mark.parametrize("number", [1, 2])
def test_images_serve_several_logits(number):
    x, logits = torch.rand(6, 33).round(), torch.randn(4, 6, 33)
    with num_threads(number):
        total, slope = kernel(x, logits)
    expected, expected_slope = kernel(x.expand(4, 6, 33).contiguous(), logits)
    assert torch.equal(total, expected)
    assert torch.equal(slope, expected_slope)


@pytest.mark.parametrize("at", [0, 15, 39])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_logit_that_is_not_finite_counts_in_its_row_alone(bad, at):
    x, logits = torch.zeros(3, 40), torch.ones(3, 40)
    logits[1, at] = bad
    total, slope = kernel(x, logits)
    assert total[[0, 2]].isfinite().all()
    expected = IndependentBernoulli(BernoulliDistribution(logits=logits, validate_args=False), 1).log_prob(x)
    torch.testing.assert_close(total, expected, equal_nan=True)
    torch.testing.assert_close(slope, -logits.sigmoid(), equal_nan=True)


@pytest.mark.parametrize("bad", [torch.nan, 0.5, -2.0])
def test_a_pixel_outside_the_support_has_the_slope_of_its_sign(bad):
    x, logits = torch.ones(1, 40), torch.randn(1, 40)
    x[0, 7] = bad
    _, slope = kernel(x, logits)
    torch.testing.assert_close(slope, x.sign().nan_to_num() - logits.sigmoid())


def captured(elbo, x, **options):
    """The graph of a loss and its gradients, and the inputs of a step."""
    torch.manual_seed(0)
    pyro.clear_param_store()
    model, guide = pair(**options)
    return captured_step(elbo, model, guide, x)


def run(graph, inputs):
    torch.manual_seed(1)
    with torch.no_grad():
        return graph(*(tensor.clone() for tensor in inputs))


def test_every_likelihood_of_a_graph_is_replaced_with_its_derivative():
    x = data(size=12)
    cases = {
        "trace": (Trace_ELBO(), 1),
        "mean-field": (TraceMeanField_ELBO(), 1),
        "two particles": (Trace_ELBO(num_particles=2), 2),
        "vectorised": (Trace_ELBO(num_particles=3, vectorize_particles=True), 1),
    }
    for name, (elbo, likelihoods) in cases.items():
        graph, inputs = captured(elbo, x)
        assert count_calls(graph, "aten.sigmoid") == 2 * likelihoods
        fused = compute_bernoulli_in_one_pass(graph)
        assert count_calls(fused, "pyro_vae.bernoulli") == likelihoods, name
        fused.graph.eliminate_dead_code()
        assert not count_calls(fused, "aten.sigmoid"), name
        assert count_calls(graph, "aten.sigmoid") == 2 * likelihoods  # what is replayed stays
        for before, after in zip(run(graph, inputs), run(fused, inputs), strict=True):
            torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


def test_an_evaluation_has_no_derivative_and_one_copy_of_each_image():
    model, guide = pair()
    x = data(size=4)

    def likelihoods(x):
        z = guide.encoder(x).sample((3,))
        return model.decoder(z).log_prob(x).detach()

    with pyro.validation_enabled(False):
        graph = make_fx(likelihoods)(x)
    fused = compute_bernoulli_in_one_pass(graph)
    (node,) = (n for n in fused.graph.nodes if "bernoulli" in str(n.target))
    pixels, _, slopes = node.args
    assert pixels.op == "placeholder"  # not one copy for each sample
    assert slopes is False
    torch.testing.assert_close(run(fused, [x]), run(graph, [x]), rtol=1e-5, atol=1e-5)


def test_a_compiled_step_calls_the_kernel_and_gives_the_numbers_of_a_replayed_one():
    x = data(size=16)

    def steps(backend):
        torch.manual_seed(0)
        model, guide = pair()
        loss = pv.CompiledELBO(TraceMeanField_ELBO(), backend=backend)
        svi = pv.SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), loss=loss)
        losses = torch.tensor([svi.step(x) for _ in range(3)])
        return losses, torch.cat([p.detach().flatten() for p in pv.parameters(model, guide)])

    expected = steps("eager")
    with config.patch(fx_graph_cache=False, force_disable_caches=True):
        numbers, codes = run_and_get_code(lambda: steps("inductor"))
    assert sum("pyro_vae_bernoulli(" in code for code in codes) == 1
    for each, other in zip(numbers, expected, strict=True):
        torch.testing.assert_close(each, other, rtol=1e-4, atol=1e-5)


def total_and_slope(change):
    def run(x, logits):
        total = IndependentBernoulli(BernoulliDistribution(logits=logits, validate_args=False), 1).log_prob(x)
        change(x, logits)
        return total, x.sign() - logits.sigmoid()

    return run


@pytest.mark.parametrize("shape", [(3, 20), (1, 20), (20,), (3, 1, 20), (2, 1, 1, 20), (1,), (3, 1)])
def test_pixels_of_any_shape_that_can_be_expanded_serve_the_logits(shape):
    x, logits = torch.rand(shape).round(), torch.randn(2, 3, 3, 20)

    def expanded(x, logits):
        return total_and_slope(lambda *_: None)(x.expand(logits.shape), logits)

    graph = make_fx(expanded)(x, logits)
    fused = compute_bernoulli_in_one_pass(graph)
    assert count_calls(fused, "pyro_vae.bernoulli") == 1
    for before, after in zip(run(graph, (x, logits)), run(fused, (x, logits)), strict=True):
        torch.testing.assert_close(after, before)


CHANGES = {
    "logits": lambda x, logits: logits.add_(1),
    "a part of them": lambda x, logits: logits.chunk(2, -1)[0].t().zero_(),
    "pixels": lambda x, logits: torch.sub(logits, 1, out=x),
    "many": lambda x, logits: torch._foreach_zero_([logits[0]]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_written_into_stays_as_it_is(change):
    x, logits = torch.ones(3, 20), torch.randn(3, 20)
    for each, number in ((change, 0), (lambda x, logits: logits.clone().add_(1), 1)):
        graph = make_fx(total_and_slope(each))(x.clone(), logits.clone())
        fused = compute_bernoulli_in_one_pass(graph)
        assert count_calls(fused, "pyro_vae.bernoulli") == number
        for before, after in zip(run(graph, (x, logits)), run(fused, (x, logits)), strict=True):
            torch.testing.assert_close(after, before)


def test_what_is_no_such_likelihood_stays_as_it_is():
    x, logits = torch.ones(3, 20), torch.randn(3, 20)
    wide = make_fx(total_and_slope(lambda *_: None))(x.double(), logits.double())
    assert not count_calls(compute_bernoulli_in_one_pass(wide), "pyro_vae.bernoulli")
    graph, _ = captured(Trace_ELBO(), data("continuous-bernoulli"), likelihood="continuous-bernoulli")
    assert not count_calls(compute_bernoulli_in_one_pass(graph), "pyro_vae.bernoulli")


@pytest.mark.parametrize("without", ["compiler", "call"])
def test_without_the_kernel_torch_s_compiler_takes_its_own_way(without, monkeypatch):
    graph, _ = captured(Trace_ELBO(), data())
    if without == "compiler":
        monkeypatch.setattr(bernoulli_kernel, "_kernel_compiles", lambda: False)
    with config.patch(cpp_wrapper=without == "call"):
        assert count_calls(compute_bernoulli_in_one_pass(graph), "pyro_vae.bernoulli") == 0
