"""log_evidence and elbo_terms against closed forms, in chunks, compiled, and of any batch."""

import math
import subprocess
import sys

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from mixture_pairs import Mixture, MixtureGuide
from pyro.nn import PyroModule
from registry import LIKELIHOODS, POSTERIORS, data, pair

import pyro_vae as pv
from pyro_vae.evaluation import references, weights
from pyro_vae.programs import Pair


@pytest.fixture
def linear():
    model, guide = references.linear_gaussian()
    references.set_to_posterior(model, guide, spread=1.3)
    return model, guide, torch.randn(50, 5, dtype=torch.float64)


# The evidence.


def test_log_evidence_is_the_evidence(linear):
    model, guide, x = linear
    estimate = pv.log_evidence(model, guide, x, 20_000)
    exact = references.evidence(model, x)
    assert estimate.values.shape == estimate.standard_error.shape == (50,)
    assert ((estimate.values - exact).abs() < 5 * estimate.standard_error).all()
    assert estimate.standard_error.max() < 0.02
    assert estimate.mean().item() == pytest.approx(exact.mean().item(), abs=0.02)


def test_with_the_exact_posterior_one_sample_is_enough(linear):
    model, _, x = linear

    class Posterior(PyroModule):
        def forward(self, x):
            with pyro.plate("data", len(x)):
                q = references.posterior(model, x)
                pyro.sample("z", dist.MultivariateNormal(q.mean, q.covariance_matrix))

    for num_samples in (2, 151):  # the second in two runs of 76, of which one draw is too many
        estimate = pv.log_evidence(model, Posterior(), x, num_samples)
        torch.testing.assert_close(estimate.values, references.evidence(model, x))
        zero = torch.zeros_like(estimate.values)
        torch.testing.assert_close(estimate.standard_error, zero, atol=1e-6, rtol=0)


def test_the_bound_rises_with_the_samples(linear):
    model, guide, x = linear
    elbo = sum(pv.elbo_terms(model, guide, x).elbo.mean() for _ in range(20)) / 20
    few = sum(pv.log_evidence(model, guide, x, 5).mean() for _ in range(20)) / 20
    many = pv.log_evidence(model, guide, x, 2000).mean()
    assert elbo < few < many


def test_the_standard_error_is_the_spread_of_repetitions(linear):
    model, guide, x = linear
    values, errors = (each.view(60, -1) for each in pv.log_evidence(model, guide, x.repeat(60, 1), 1000))
    spread, estimated = values.std(0), errors.mean(0)
    assert 0.8 < (spread / estimated).median() < 1.25


def test_one_sample_has_no_standard_error(linear):
    estimate = pv.log_evidence(*linear, 1)
    assert estimate.values.isfinite().all()
    assert estimate.standard_error.isnan().all()


def test_a_number_of_numpy_is_a_number_of_samples(linear):
    assert pv.log_evidence(*linear, np.int64(3)).values.shape == (50,)


@pytest.mark.filterwarnings("default")  # torch 2.11's compiler uses what torch deprecates
def test_compiled_log_evidence_has_the_numbers_of_eager():
    """With a whole chunk that is compiled, a last one of fewer data, and a draw too many."""
    model, guide = pair(width=64, hidden=40)
    x = data(width=64, size=110)
    estimates = []
    for compiled in (False, True):
        torch.manual_seed(0)
        estimates.append(pv.log_evidence(model, guide, x, 151, compiled=compiled))
    for ours, theirs in zip(*estimates, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_log_evidence_of_reduced_precision_is_near():
    model, guide = pair(width=64, hidden=40)
    x = data(width=64, size=110)
    full = pv.log_evidence(model, guide, x, 2000)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        reduced = pv.log_evidence(model, guide, x, 2000)
    assert reduced.values.dtype == torch.float32
    error = (full.standard_error.square() + reduced.standard_error.square()).mean().sqrt()
    assert abs(full.mean() - reduced.mean()) < 0.02 + 5 * error / math.sqrt(len(x))


def test_a_pair_that_cannot_be_captured_is_refused():
    model, guide = pair()

    class Branching(PyroModule):
        def __init__(self):
            super().__init__()
            self.guide = guide

        def forward(self, x):
            z = self.guide(x)
            return z if z.sum() > 0 else -z

    with pytest.raises(
        ValueError,
        match=r"expected only tensor operations.*cannot capture: test_evidence\.py, line .*z\.sum\(\) > 0",
    ):
        pv.log_evidence(model, Branching(), data(), 100, compiled=True)


# The terms of the ELBO.


def test_elbo_terms_are_the_closed_form(linear):
    model, guide, x = linear
    exact = {"reconstruction": references.reconstruction(model, guide, x), "kl": references.kl(guide, x)}
    terms = pv.elbo_terms(model, guide, x.repeat(1000, 1))
    for name, expected in exact.items():
        values = getattr(terms, name).double().view(1000, -1)
        error = values.std(0) / math.sqrt(1000)
        assert ((values.mean(0) - expected).abs() < 5 * error).all()
    torch.testing.assert_close(terms.elbo, terms.reconstruction - terms.kl)


def test_a_model_without_latents_has_no_kl():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1), obs=x)

    terms = pv.elbo_terms(model, lambda x: None, torch.randn(4, 3))
    assert torch.equal(terms.kl, torch.zeros(4))
    assert torch.equal(terms.elbo, terms.reconstruction)


# Any pair, any batch.


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("posterior", POSTERIORS)
def test_every_pair_is_evaluated(likelihood, posterior):
    model, guide = pair(likelihood, posterior)
    x = data(likelihood)
    before = [p.clone() for p in pv.parameters(model, guide)]
    assert pv.log_evidence(model, guide, x, 10).values.shape == (8,)
    assert pv.elbo_terms(model, guide, x).elbo.shape == (8,)
    assert pv.generate(model, x)["x"].sample().shape == x.shape
    assert pv.reconstruct(model, guide, x)["x"].mean.shape == x.shape
    torch.testing.assert_close(before, pv.parameters(model, guide), rtol=0, atol=0)
    assert model.training
    assert not pyro.get_param_store()


def test_several_arguments_are_cut_alike():
    """p(x | z, y): the second tensor has a row for each data point, the third is shared by all."""

    class Conditional(PyroModule):
        def forward(self, x, y, spread):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(y, 1.0))
                pyro.sample("x", dist.Normal(z, spread), obs=x)

    class Encoder(PyroModule):
        def forward(self, x, y, spread):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal((x + y) / 2, 1.0))

    x, y, spread = torch.randn(5000), torch.randn(5000), torch.tensor([2.0])
    estimate = pv.log_evidence(Conditional(), Encoder(), (x, y, spread), 100)
    exact = dist.Normal(y, math.sqrt(5.0)).log_prob(x)
    assert estimate.mean().item() == pytest.approx(exact.mean().item(), abs=0.02)


@pytest.mark.parametrize("batch", ["x", {"x": torch.zeros(2, 5)}])
def test_a_batch_without_an_order_is_refused(linear, batch):
    model, guide, _ = linear
    with pytest.raises(
        ValueError, match=f"batch: expected a tensor, or a tuple or list.*got {type(batch).__name__}"
    ):
        pv.log_evidence(model, guide, batch)


@pytest.mark.parametrize(
    ("batch", "given"),
    [
        (torch.zeros(0, 5), r"a tensor of shape \(0, 5\)"),
        ((), r"\(\)"),
        (torch.tensor(1.0), r"a tensor of shape \(\)"),
    ],
)
def test_a_batch_without_data_is_refused(linear, batch, given):
    model, guide, _ = linear
    for evaluate in (pv.log_evidence, pv.elbo_terms):
        with pytest.raises(ValueError, match=f"batch: expected data, .*got .*{given}"):
            evaluate(model, guide, batch)


@pytest.mark.parametrize("num_samples", [0, -1, 2.5])
def test_other_numbers_of_samples_are_refused(linear, num_samples):
    with pytest.raises(ValueError, match=f"num_samples: expected a positive whole number, got {num_samples}"):
        pv.log_evidence(*linear, num_samples)


# In chunks.


def test_chunks_do_not_show(linear, monkeypatch):
    model, guide, x = linear
    whole = pv.log_evidence(model, guide, x, 1000)
    monkeypatch.setattr(weights, "ROWS", 64)
    monkeypatch.setattr(weights, "SAMPLES", 24)  # 42 runs of 24, of which the last counts 16
    parts = pv.log_evidence(model, guide, x, 1000)
    assert ((whole.values - parts.values).abs() < 6 * whole.standard_error).all()


def test_a_last_chunk_of_one_data_point_has_the_form_of_the_others(monkeypatch):
    monkeypatch.setattr(weights, "ROWS", 4)
    x = torch.randn(5)
    for rows in (x, x[:1]):
        terms = pv.elbo_terms(Mixture(), MixtureGuide(), rows)
        assert [term.shape for term in terms] == 3 * [rows.shape]
        torch.testing.assert_close(terms.elbo, terms.reconstruction - terms.kl)


def test_without_particles_side_by_side_there_are_more_data_at_a_time(monkeypatch):
    monkeypatch.setattr(weights, "ROWS", 64)
    sizes = []

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            if z.dim() > 1:
                raise RuntimeError("one particle at a time")
            sizes.append(len(x))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, math.sqrt(0.5)))  # the posterior

    x = torch.randn(60)
    values = pv.log_evidence(model, guide, x, 16).values
    torch.testing.assert_close(values, dist.Normal(0.0, math.sqrt(2.0)).log_prob(x))
    assert sizes[-16:] == 16 * [60]


def test_a_late_data_point_outside_the_support_is_found(monkeypatch):
    """Only the first chunk is checked in full: the rest is found by its -inf."""
    monkeypatch.setattr(weights, "ROWS", 4)
    model, guide = pair()
    x = data(size=40)
    x[-1, 0] = 0.5
    for evaluate in (
        lambda: pv.log_evidence(model, guide, x, 4),
        lambda: pv.elbo_terms(model, guide, x),
    ):
        with pytest.raises(ValueError, match=r"'x'.*outside its support in 1 of .*0\.5"):
            evaluate()


MEMORY = """
import torch
from torch import nn
import pyro_vae as pv
torch.set_num_threads(1)
model = pv.Model(pv.StandardNormal(2), nn.Sequential(pv.MLP(2, 8, 784), pv.Bernoulli()))
guide = pv.Guide(nn.Sequential(pv.MLP(784, 8, 4), pv.DiagNormal()))
x = torch.ones(16 * 800, 784)
for size in (16 * 40, 16 * 800):
    pv.log_evidence(model, guide, x[:size], 128, compiled=True)  # in chunks of sixteen data
    with open("/proc/self/status") as status:
        print(next(line.split()[1] for line in status if line.startswith("VmRSS")))
"""


@pytest.mark.proofs
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's /proc")
def test_memory_does_not_grow_with_the_number_of_data():
    """In most runs it would by hundreds of MB, in pieces between tensors of a few bytes that are kept."""
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    few, many = map(int, run.stdout.split())
    assert many - few < 150_000


def test_more_rows_run_at_once_where_launches_cost_more():
    here, there = (Pair(Mixture(), MixtureGuide(), (torch.zeros(3, device=d),)) for d in ("cpu", "meta"))
    assert weights.rows_at_once(there) > weights.rows_at_once(here) == weights.ROWS
