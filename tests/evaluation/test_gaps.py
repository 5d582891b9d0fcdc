"""inference_gaps where both gaps are known: linear-Gaussian posteriors, families that hold them or do not."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import nn

import pyro_vae as pv
from pyro_vae.evaluation import gaps, references

DIM, WIDTH = 2, 5


@pytest.fixture
def exact():
    """A model whose posterior is correlated, data, log p(x), and the gap of the best diagonal Gaussian."""
    model, guide = references.linear_gaussian(WIDTH, DIM, sigma=0.5)
    with torch.no_grad():
        model.decoder[0].weight[:, 1] = model.decoder[0].weight[:, 0] + 0.1 * torch.randn(WIDTH)
    references.set_to_posterior(model, guide)
    x = torch.randn(60, WIDTH, dtype=torch.float64)
    precision = torch.linalg.inv(references.posterior(model, x).covariance_matrix[0])
    # min KL(q || p) over diagonal q: 1 / 2 log prod_i P_ii / |P|, P the precision of the posterior.
    gap = 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision)).item()
    assert gap > 0.1
    return model, guide, x, gap


def test_a_diagonal_family_on_a_correlated_posterior(exact):
    model, guide, x, gap = exact
    found = pv.inference_gaps(model, guide, x, 400, 2000)
    assert ((found.approximation - gap).abs() < 5 * found.approximation_error + 0.02).all()
    assert found.approximation.mean().item() == pytest.approx(gap, abs=0.02)
    amortisation = (references.evidence(model, x) - gap - references.elbo(model, guide, x)).detach()
    assert amortisation.mean() > 0.05  # the marginal standard deviations are too wide
    assert ((found.amortisation - amortisation).abs() < 5 * found.amortisation_error + 1e-3).all()
    torch.testing.assert_close(found.approximation + found.amortisation, found.log_evidence - found.elbo)


def test_an_encoder_with_a_known_error(exact):
    model, guide, x, _ = exact
    with torch.no_grad():
        guide.encoder[0].bias[:DIM] += torch.tensor([0.6, -0.4])  # of the mean
        guide.encoder[0].bias[DIM:] -= 0.4  # of log sigma
    found = pv.inference_gaps(model, guide, x, 400, 1000)
    best = references.evidence(model, x) - exact[3]
    amortisation = (best - references.elbo(model, guide, x)).detach()
    assert amortisation.mean() > 0.3
    assert ((found.amortisation - amortisation).abs() < 5 * found.amortisation_error + 1e-3).all()


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(pv.FullNormal(), id="full"),
        pytest.param(pv.FlowNormal(DIM, steps=1, hidden=4, context=3), id="flow", marks=pytest.mark.proofs),
    ],
)
def test_a_family_that_holds_the_posterior_has_no_approximation_gap(exact, family):
    model, _, x, gap = exact
    encoder = nn.Sequential(nn.Linear(WIDTH, family.num_features(DIM)), family).double()
    guide = pv.Guide(encoder)
    optimizer = torch.optim.Adam(guide.parameters(), lr=1e-2)
    svi = pv.SVI(model.requires_grad_(False), guide, optimizer, loss=pv.STL(4))
    for _ in range(200):  # a flow has to learn its bend
        svi.step(x)
    found = pv.inference_gaps(model, guide, x[:20], 300, 500)
    assert found.approximation.mean().abs() < (1e-4 if isinstance(family, pv.FullNormal) else 0.3 * gap)
    assert found.amortisation.mean() > 0


class PlainGuide(PyroModule):
    """A guide in plain Pyro, and a parameter that all data share."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Linear(WIDTH, DIM).double()
        self.log_sigma = nn.Parameter(torch.zeros(DIM, dtype=torch.float64))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.loc(x), self.log_sigma.exp()).to_event(1))


def test_a_guide_in_plain_pyro_frozen_too(exact):
    model, _, x, gap = exact
    guide = PlainGuide().requires_grad_(False)
    found = pv.inference_gaps(model, guide, x, 400, 500)
    assert found.approximation.mean().item() == pytest.approx(gap, abs=0.02)
    assert not any(p.requires_grad for p in guide.parameters())


def test_a_latent_on_a_transformed_scale(exact):
    # z = exp(u) with u ~ N(0, 1), x ~ N(log z, s^2 I): the posterior of u is Gaussian, that of z LogNormal.
    class LogModel(nn.Module):
        def forward(self, x):
            with pyro.plate("data", len(x)):
                one = torch.ones(len(x), dtype=x.dtype)
                z = pyro.sample("z", dist.LogNormal(0 * one, one))
                pyro.sample("x", dist.Normal(z.log().unsqueeze(-1), 0.7).expand_by([]).to_event(1), obs=x)

    class LogGuide(PyroModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(1, 2).double()
            with torch.no_grad():
                self.net.weight.mul_(0.1)

        def forward(self, x):
            with pyro.plate("data", len(x)):
                loc, log_sigma = self.net(x).unbind(-1)
                pyro.sample("z", dist.LogNormal(loc, log_sigma.exp()))

    x = torch.randn(30, 1, dtype=torch.float64)
    found = pv.inference_gaps(LogModel(), LogGuide(), x, 500, 500)
    assert found.approximation.abs().max() < 1e-4
    evidence = dist.Normal(0.0, math.sqrt(1 + 0.7**2)).log_prob(x[:, 0])
    assert (found.log_evidence - evidence).abs().max() < 1e-4


def test_data_in_chunks_masks_and_a_kl_weight(exact, monkeypatch):
    model, guide, x, gap = exact
    monkeypatch.setattr(gaps.weights, "ROWS", 8 * gaps._DRAWS)  # eight data at once, and the last four
    beta = pv.scale_latents(0.1)  # evaluation ignores weights
    found = pv.inference_gaps(beta(model), beta(guide), x[:20], 300, 200)
    assert found.elbo.shape == (20,)
    assert found.approximation.mean().item() == pytest.approx(gap, abs=0.03)


class TwoLatents(nn.Module):
    def __init__(self, arrow):
        super().__init__()
        self.net, self.arrow = nn.Linear(WIDTH, 2).double(), arrow

    def forward(self, x):
        with pyro.plate("data", len(x)):
            a, b = self.net(x).unbind(-1)
            a = pyro.sample("a", dist.Normal(a, 1.0))
            pyro.sample("b", dist.Normal(b + a if self.arrow else b, 1.0))


class TwoModel(nn.Module):
    def forward(self, x):
        with pyro.plate("data", len(x)):
            zero = torch.zeros(len(x), dtype=x.dtype)
            a, b = (pyro.sample(name, dist.Normal(zero, 1.0)) for name in "ab")
            loc = torch.stack([a, b, a + b, a - b, a], -1)
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


def test_two_latents_without_an_arrow_are_taken_and_with_one_refused():
    x = torch.randn(10, WIDTH, dtype=torch.float64)
    found = pv.inference_gaps(TwoModel(), TwoLatents(False), x, 300, 300)
    assert (found.amortisation > 0).all()
    with pytest.raises(ValueError, match="Site 'b' of the guide: expected .* no other latent, got .* 'a'"):
        pv.inference_gaps(TwoModel(), TwoLatents(True), x)


class Odd(PyroModule):
    def __init__(self, make):
        super().__init__()
        self.net, self.make = nn.Linear(WIDTH, DIM).double(), make

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.make(self.net(x)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda h: dist.Delta(h).to_event(1), "got Delta"),
        (lambda h: dist.Normal(torch.zeros_like(h), 1.0).to_event(1), "come from the guide's modules"),
    ],
)
def test_families_without_known_parameters_are_refused(exact, make, message):
    model, _, x, _ = exact
    with pytest.raises(ValueError, match=message):
        pv.inference_gaps(model, Odd(make), x)


@pytest.mark.parametrize("counts", [{"num_steps": 0}, {"num_samples": 1}, {"num_steps": 1.5}])
def test_bad_numbers_are_refused(exact, counts):
    model, guide, x, _ = exact
    with pytest.raises(ValueError, match=next(iter(counts))):
        pv.inference_gaps(model, guide, x, **counts)


def test_nothing_moves_but_the_random_state(exact):
    model, guide, x, _ = exact
    guide.train()
    before = {name: p.clone() for name, p in guide.named_parameters()}
    pv.inference_gaps(model, guide, x, 3, 10)
    assert guide.training
    for name, p in guide.named_parameters():
        assert torch.equal(p, before[name])
        assert p.grad is None


def test_a_notebook_shows_the_means(exact):
    model, guide, x, _ = exact
    table = pv.inference_gaps(model, guide, x, 3, 10)._repr_html_()
    assert "amortisation" in table
    assert "error" not in table.replace("standard error", "")
