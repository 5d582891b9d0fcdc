"""evidence_diagnostics: effective sample size and Pareto k-hat against closed forms and a known fit."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule

import pyro_vae as pv
from pyro_vae.evaluation import references
from pyro_vae.evaluation.diagnostics import pareto_shape


def tail_of(log_w, count):
    largest = (log_w - log_w.amax(0)).exp().topk(count + 1, 0).values
    return largest[:-1] - largest[-1]


@pytest.mark.parametrize(
    ("shape", "arviz"),
    [(0.2, 0.2368082972555032), (0.7, 0.6699004120429832), (1.2, 1.1032047898364323)],
)
def test_the_fit_is_that_of_arviz(shape, arviz):
    # psislw of arviz-stats 0.8.0, of the quantiles of a Pareto distribution.
    log_w = -shape * ((torch.arange(1000, dtype=torch.float64) + 0.5) / 1000).log()
    assert pareto_shape(tail_of(log_w, 94)).item() == pytest.approx(arviz, abs=1e-10)


@pytest.mark.parametrize("shape", [-0.3, 0.3, 0.7, 1.2])
def test_the_shape_of_generalised_pareto_draws_is_found(shape):
    draws = torch.rand(1000, 300, dtype=torch.float64).pow(-shape).sub(1).div(shape)
    found = pareto_shape(draws.sort(0, descending=True).values)
    # The prior draws k towards 1/2 by a hundredth of the distance.
    assert abs(found.mean() - (1000 * shape + 5) / 1010) < 0.02
    assert found.std() == pytest.approx((1 + shape) / math.sqrt(1000), rel=0.2)  # that of maximum likelihood


def test_a_guide_that_is_too_narrow_has_the_shape_of_its_tail():
    # q is s times as wide as the posterior: w = exp(chi^2 (1 - s^2) / 2), whose tail has the shape 1 - s^2
    # but for a power of a logarithm, which makes it look lighter.
    found = {}
    for spread in (0.3, 0.6, 0.9):
        torch.manual_seed(1)
        model, guide = references.linear_gaussian(dim=1)
        references.set_to_posterior(model, guide, spread)
        x = torch.randn(100, 5, dtype=torch.float64)
        found[spread] = pv.evidence_diagnostics(model, guide, x, 2000)
        k, exact = found[spread].pareto_k.mean().item(), 1 - spread**2
        assert exact - 0.15 < k < exact + 0.08
    assert not found[0.3].trusted.all()
    assert found[0.9].trusted.all()


def test_the_effective_sample_size_of_a_wide_guide_is_exact():
    # E[w]^2 / E[w^2] of a Gaussian q that is s times as wide as the posterior: sqrt(2 s^2 - 1) / s^2.
    spread, num_samples = 1.5, 4000
    model, guide = references.linear_gaussian(dim=1)
    references.set_to_posterior(model, guide, spread)
    found = pv.evidence_diagnostics(model, guide, torch.randn(50, 5, dtype=torch.float64), num_samples)
    share = found.effective_sample_size / num_samples
    assert share.shape == (50,)
    assert (share - math.sqrt(2 * spread**2 - 1) / spread**2).abs().max() < 0.02
    assert (found.pareto_k < 0).all()  # bounded weights


def test_equal_weights_are_the_best_and_a_single_one_the_worst():
    class Posterior(PyroModule):
        def forward(self, x):
            with pyro.plate("data", len(x)):
                q = references.posterior(model, x)
                pyro.sample("z", dist.MultivariateNormal(q.mean, q.covariance_matrix))

    model, guide = references.linear_gaussian()
    x = torch.randn(3, 5, dtype=torch.float64)
    exact = pv.evidence_diagnostics(model, Posterior(), x, 100)
    assert (exact.pareto_k == -math.inf).all()
    assert exact.trusted.all()
    torch.testing.assert_close(exact.effective_sample_size, torch.full((3,), 100.0, dtype=torch.float64))
    with torch.no_grad():
        guide.encoder[0].weight[:2] *= 1000  # draws so far apart that one has all the weight
    alone = pv.evidence_diagnostics(model, guide, x, 100)
    assert (alone.effective_sample_size < 1.1).all()
    assert not alone.trusted.any()


def test_data_in_chunks_and_a_threshold_that_knows_the_number_of_samples():
    model, guide = references.linear_gaussian()
    x = torch.randn(70, 5, dtype=torch.float64)
    found = pv.evidence_diagnostics(model, guide, x, 128)  # chunks of 16 data
    assert found.pareto_k.shape == (70,)
    assert found.threshold == 1 - 1 / math.log10(128)
    assert found._replace(num_samples=10_000).threshold == 0.7


@pytest.mark.parametrize("num_samples", [24, 0, 100.0, True])
def test_too_few_samples_have_no_tail(num_samples):
    model, guide = references.linear_gaussian()
    x = torch.randn(3, 5, dtype=torch.float64)
    with pytest.raises(ValueError, match="num_samples: expected a whole number of at least 25"):
        pv.evidence_diagnostics(model, guide, x, num_samples)
