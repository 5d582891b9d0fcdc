"""Pairs that evaluation once took for others: each number against a closed form, or refused in words."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta
from torch import nn

import pyro_vae as pv

SHIFTS = torch.tensor([-2.0, 2.0])
SHARES = torch.tensor([0.3, 0.7])


class Mixed(nn.Module):
    """z ~ N(0, 1);  k ~ SHARES, summed out;  x ~ N(z + SHIFTS[k], 1)."""

    def __init__(self, **infer):
        super().__init__()
        self.infer = {"enumerate": "parallel", **infer}

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            k = pyro.sample("k", dist.Categorical(SHARES), infer=self.infer)
            pyro.sample("x", dist.Normal(z + SHIFTS[k], 1.0), obs=x)


class AboutZ(nn.Module):
    """z ~ N(0.1 + 0.3 x, 1)."""

    def __init__(self):
        super().__init__()
        self.line = nn.Linear(1, 1)
        with torch.no_grad():
            self.line.weight.fill_(0.3)
            self.line.bias.fill_(0.1)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.line(x.nan_to_num().unsqueeze(-1)).squeeze(-1), 1.0))


def log_likelihood(z, x):
    return (SHARES.log() + dist.Normal(z.unsqueeze(-1) + SHIFTS, 1.0).log_prob(x.unsqueeze(-1))).logsumexp(-1)


@pytest.mark.parametrize("elbo", [pv.IWAE(300), pv.Renyi(0.5, 300), pv.DReG(300)])
def test_the_terms_of_a_bound_of_many_samples_sum_out_too(elbo):
    model, guide, x = Mixed(), AboutZ(), torch.randn(2000)
    explanation = pv.explain(model, guide, elbo, x)
    draws = dist.Normal(0.1 + 0.3 * x, 1.0).sample((100,))
    exact = log_likelihood(draws, x).mean(0).sum().item()
    terms = {term.site: term for term in explanation.terms}
    # one draw for each of 2,000 data points, whose log likelihood has a standard deviation below 1
    assert abs(terms["x"].nats - exact) < 4 * math.sqrt(len(x))
    from_the_prior = (SHARES * dist.Normal(draws.unsqueeze(-1) + SHIFTS, 1.0).log_prob(x[..., None])).sum(-1)
    assert abs(from_the_prior.mean(0).sum() - exact) > 1000  # what it was once
    assert terms["k"].draw == ""
    assert explanation.note.endswith("the terms are those of IWAE(1), of one draw.")


@pytest.mark.parametrize("evaluate", [pv.log_evidence, pv.elbo_terms, pv.impute])
def test_a_site_that_draws_some_values_is_not_summed_out(evaluate):
    with pytest.raises(ValueError, match="'k'. only in the model.*without num_samples"):
        evaluate(Mixed(num_samples=5), AboutZ(), torch.randn(4))


def test_completions_beside_a_site_that_is_summed_out_are_of_observed_sites_alone():
    x = torch.tensor([0.5, math.nan, -1.0])
    completed = pv.impute(Mixed(), AboutZ(), x, 4000)
    assert list(completed) == ["x"]
    assert completed["x"].mean.shape == x.shape
    assert completed["x"].mean[1] == pytest.approx(float(SHARES @ SHIFTS), abs=0.2)  # its prior mean


class Rows(nn.Module):
    """z ~ N(0, I), an inner plate of 3;  x ~ N(z, I)."""

    def forward(self, x):
        with pyro.plate("data", len(x), dim=-1), pyro.plate("inner", 3, dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(3, len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x.mT)


class Transposed(nn.Module):
    """z ~ N((W x)^T, 0.8), whose location is not contiguous."""

    def __init__(self):
        super().__init__()
        self.line = nn.Linear(3, 3)

    def forward(self, x):
        with pyro.plate("data", len(x), dim=-1), pyro.plate("inner", 3, dim=-2):
            pyro.sample("z", dist.Normal(2 * self.line(x).mT, 0.8))


def test_gaps_of_parameters_that_are_not_contiguous():
    x = torch.randn(7, 3)
    gaps = pv.inference_gaps(Rows(), Transposed(), x, 400, 400)
    exact = dist.Normal(0.0, 2**0.5).log_prob(x).sum(-1)
    torch.testing.assert_close(gaps.log_evidence.float(), exact, atol=0.1, rtol=0)
    posterior = dist.Normal(torch.zeros(3), 0.5**0.5)
    approximation = dist.kl.kl_divergence(dist.Normal(torch.zeros(3), 0.8), posterior).sum()
    torch.testing.assert_close(
        gaps.approximation.float().mean(), approximation, atol=0.05, rtol=0, check_device=False
    )


class PlainBernoulli(nn.Module):
    """Pyro's own, whose log_prob of a grey value is a plausible number."""

    def forward(self, logits):
        return dist.Bernoulli(logits=logits).to_event(1)


@pytest.fixture
def binary():
    decoder = nn.Sequential(nn.Linear(2, 3), PlainBernoulli())
    encoder = nn.Sequential(nn.Linear(3, 4), pv.DiagNormal())
    return pv.Model(pv.StandardNormal(2), decoder), pv.Guide(encoder)


@pytest.mark.parametrize(
    "evaluate",
    [
        lambda *pair: pv.log_evidence(*pair, 2),
        pv.elbo_terms,
        lambda *pair: pv.evidence_diagnostics(*pair, 25),
        lambda *pair: pv.inference_gaps(*pair, 2, 2),
        lambda *pair: pv.annealed_evidence(*pair, 2, 2),
    ],
)
def test_a_bad_row_is_found_at_the_end_of_a_large_batch_too(evaluate, binary):
    x = torch.randint(2, (3000, 3)).float()
    x[-1] = 0.5
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="'x' of the model, Bernoulli: expected 0 or 1, got values outside"):
        evaluate(*binary, x)
    assert torch.equal(torch.get_rng_state(), before)


class Encoded(nn.Module):
    """z ~ q(z | x), in a plain module."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.encoder(x))


@pytest.mark.parametrize("noisy", [nn.Dropout(0.5), nn.BatchNorm1d(3)])
def test_a_module_in_a_closure_that_is_in_train_mode_is_refused(noisy, binary):
    model, guide = binary
    guide = Encoded(nn.Sequential(noisy, *guide.encoder))
    x = torch.randint(2, (8, 3)).float()
    before = [buffer.clone() for buffer in noisy.buffers()]
    for evaluate in (pv.log_evidence, pv.elbo_terms, pv.latent_terms):
        with pytest.raises(
            ValueError, match=f"all modules inside them.*got a {type(noisy).__name__} in train"
        ):
            evaluate(model, lambda x: guide(x), x)
    torch.testing.assert_close(list(noisy.buffers()), before, rtol=0, atol=0)
    torch.manual_seed(1)
    inside = pv.elbo_terms(model, guide, x).elbo
    guide.eval()
    torch.manual_seed(1)
    torch.testing.assert_close(pv.elbo_terms(model, lambda x: guide(x), x).elbo, inside)


def test_generation_refuses_it_too():
    decoder, prior = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 3), pv.Bernoulli()), pv.StandardNormal(2)

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", decoder(pyro.sample("z", prior())), obs=x)

    with pytest.raises(ValueError, match="got a Dropout in train mode"):
        pv.generate(model, torch.zeros(4, 3))
    decoder.eval()
    assert pv.generate(model, torch.zeros(4, 3))["x"].mean.shape == (4, 3)


@pytest.mark.parametrize(
    "evaluate", [pv.log_evidence, pv.evidence_diagnostics, pv.latent_terms, pv.kl_decomposition]
)
def test_points_have_no_importance_weights_and_no_kl(evaluate, binary):
    model, _ = binary
    x = torch.randint(2, (5, 3)).float()
    guide = AutoDelta(model)
    guide(x)
    with pytest.raises(ValueError, match="'z' of the guide: expected a density.*got a point.*elbo_terms"):
        evaluate(model, guide, x)
    assert pv.elbo_terms(model, guide, x).elbo.shape == (5,)


class OfLabels(nn.Module):
    """z ~ N(y, 1), a prior for each label;  x ~ N(z, 1)."""

    def forward(self, x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(y.unsqueeze(-1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


class Halfway(nn.Module):
    """z ~ N((x + y) / 2, 1 / 2), the posterior."""

    def forward(self, x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x + y.unsqueeze(-1)) / 2, 0.5**0.5).to_event(1))


def test_a_decomposition_needs_one_prior():
    x, y = torch.randn(6, 1), torch.arange(6.0)
    with pytest.raises(ValueError, match="'z' of the model: expected one prior for all data.*one condition"):
        pv.kl_decomposition(OfLabels(), Halfway(), (x, y))
    assert pv.kl_decomposition(OfLabels(), Halfway(), (x, torch.ones(6)))["z"].marginal_kl.isfinite()


@pytest.mark.parametrize("inside", [True, False])
def test_a_decomposition_refuses_masks_in_distributions(inside):
    def masked(fn, mask):
        if inside:
            return fn.mask(mask.unsqueeze(-1)).to_event(1)
        return fn.to_event(1).mask(mask)

    def model(x, mask):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", masked(dist.Normal(torch.zeros_like(x), 1.0), mask))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x, mask):
        with pyro.plate("data", len(x)):
            pyro.sample("z", masked(dist.Normal(x / 2, 0.7), mask))

    with pytest.raises(ValueError, match="Site 'z': expected no masks on latents"):
        pv.kl_decomposition(model, guide, (torch.randn(6, 2), torch.arange(6) < 3))


class Folded(nn.Module):
    """z = |N(loc, 1)|;  x ~ N(z, 1)."""

    def __init__(self, loc):
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(loc))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample(
                "z", dist.FoldedDistribution(dist.Normal(self.loc.expand(len(x), 1), 1.0)).to_event(1)
            )
            if x is not None and self.loc > 0:
                pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def test_a_folded_distribution_has_no_closed_form():
    """That of torch is the KL of what is folded: 4.5 for N(1, 1) and N(-2, 1), where the right KL is 0.4."""
    model, guide, x = Folded(1.0), Folded(-2.0), torch.rand(4000, 1)
    (z, _) = pv.explain(model, guide, pv.MeanField(), x).terms
    assert z.estimate == "Monte Carlo"
    assert "no right KL(FoldedDistribution || FoldedDistribution) is registered" in z.why
    grid = torch.linspace(1e-6, 12, 20001)
    q, p = (dist.FoldedDistribution(dist.Normal(loc, 1.0)).log_prob(grid) for loc in (-2.0, 1.0))
    exact = torch.trapezoid(q.exp() * (q - p), grid).item()
    assert z.nats / len(x) == pytest.approx(exact, abs=0.06)
    assert exact < 1 < 4.5
    svi = pv.SVI(model, guide, torch.optim.Adam(pv.parameters(model, guide)), loss=TraceMeanField_ELBO())
    with pytest.raises(
        ValueError, match="no folded distribution, since TraceMeanField_ELBO.*FoldedDist.*MeanF"
    ):
        svi.step(x)


def test_a_mask_is_counted_in_log_probabilities():
    def model(x):
        mask = pyro.poutine.mask(mask=(torch.arange(7) < 5).unsqueeze(-1))
        with pyro.plate("data", len(x), dim=-2), pyro.plate("columns", 3, dim=-1), mask:
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    (term,) = pv.explain(model, lambda x: None, pyro.infer.Trace_ELBO(), torch.zeros(7, 3)).terms
    assert term.mask == "15 of 21"


def test_a_plate_without_a_size_shows_that_of_its_data():
    def model(x):
        with pyro.plate("data"):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data"):
            pyro.sample("z", dist.Normal(x, 1.0))

    terms = pv.explain(model, guide, pyro.infer.Trace_ELBO(), torch.zeros(7)).terms
    assert [term.plates for term in terms] == ["data 7", "data 7"]


@pytest.mark.parametrize("twice", [False, True])
def test_a_nan_that_is_lost_in_one_input_is_found_beside_another_input(twice):
    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            if twice:
                pyro.sample("x again", dist.Normal(z, 2.0), obs=x)
            pyro.sample("y", dist.Bernoulli(logits=z), obs=(y > 0.5).float())

    def guide(x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    nan = torch.tensor([math.nan, 0.2, 1.0])
    with pytest.raises(ValueError, match="expected every NaN of the batch at an observed site, got 1 of 2"):
        pv.log_evidence(*pv.mask_missing(model, guide), (nan, nan.flip(0)), 5)
