"""Factors are part of a loss, not of log p(x, z) or log q(z | x)."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn

import pyro_vae as pv


class PenalisedModel(pv.Model):
    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior())
            pyro.sample("x", self.decoder(z), obs=x)
            pyro.factor("penalty", -0.7 * x[..., 0] ** 2)


class PenalisedGuide(pv.Guide):
    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.encoder(x))
            pyro.factor("penalty", 0.4 * x[..., 0] ** 2, has_rsample=False)


class Sparse(nn.Module):
    """A program, and an L1 penalty on its parameters."""

    def __init__(self, program, factor):
        super().__init__()
        self.program, self.factor = program, factor

    def forward(self, x):
        self.program(x)
        pyro.factor("penalty", self.factor * sum(p.abs().sum() for p in self.parameters()), has_rsample=True)


@pytest.fixture
def linear():
    """A pair whose guide is the exact posterior, so that one draw gives log p(x), and its data."""
    model, guide = pv.references.linear_gaussian(dim=1)
    x = torch.randn(30, 5).double()
    pv.references.set_to_posterior(model, guide)
    return model, guide, x


SIDES = {
    "in the model": lambda model, guide: (PenalisedModel(model.prior, model.decoder), guide),
    "in the guide": lambda model, guide: (model, PenalisedGuide(guide.encoder)),
    "a penalty of the parameters": lambda model, guide: (Sparse(model, -0.1), guide),
    "a penalty in the guide": lambda model, guide: (model, Sparse(guide, 0.1)),
}


def svi(pair, loss=None):
    return pv.SVI(*pair, torch.optim.SGD(pv.parameters(*pair), lr=0.0), loss=loss or Trace_ELBO())


@pytest.mark.parametrize("side", SIDES)
def test_evidence_and_elbo_are_those_of_the_data(side, linear):
    model, guide, x = linear
    pair = SIDES[side](model, guide)
    exact = pv.references.evidence(model, x)
    torch.testing.assert_close(pv.log_evidence(*pair, x, 3).values, exact)
    terms = pv.elbo_terms(*pair, x)
    torch.testing.assert_close(terms.elbo, exact)
    torch.testing.assert_close(terms.reconstruction - terms.kl, terms.elbo)
    plain = pv.elbo_terms(model, guide, x)
    assert (terms.reconstruction - plain.reconstruction).abs().mean() < 1.0  # only the draws differ
    assert pv.reconstruct(*pair, x)["x"].batch_shape == (30,)
    assert list(pv.latent_terms(*pair, x, 2)) == ["z"]


@pytest.mark.parametrize("loss", [Trace_ELBO, pv.STL, lambda: pv.MeanField(2)])
@pytest.mark.parametrize("side", SIDES)
def test_a_loss_has_its_factor_and_the_elbo_of_fit_has_not(side, loss, linear):
    model, guide, x = linear
    pair = SIDES[side](model, guide)
    (record,) = pv.fit(svi(pair, loss()), [x], 1, progress=False)
    exact = pv.references.evidence(model, x).mean().item()
    assert record.elbo == pytest.approx(exact, rel=1e-9)
    total = {
        "in the model": -0.7 * x[:, 0].square().sum(),
        "in the guide": -0.4 * x[:, 0].square().sum(),
        "a penalty of the parameters": -0.1 * sum(p.abs().sum() for p in model.parameters()),
        "a penalty in the guide": -0.1 * sum(p.abs().sum() for p in guide.parameters()),
    }[side]
    # An analytic KL leaves the noise of the reconstruction.
    noise = 1.0 if isinstance(svi(pair, loss()).loss, pv.MeanField) else 1e-9
    assert record.loss == pytest.approx(-exact - total.item() / 30, abs=noise)


# Factors that may be a density.


class Likelihood(nn.Module):
    """p(x | z), written as a factor."""

    def __init__(self):
        super().__init__()
        self.b = nn.Parameter(torch.tensor(0.8))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.factor("log_px", dist.Normal(self.b * z, 1.0).log_prob(x))


class Observing(Likelihood):
    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(self.b * z, 1.0), obs=x)


class Normal(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.4))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.w * x, 0.8))


class FlowByHand(Normal):
    """z = w x + 0.8 noise, with the change of volume in a factor."""

    def forward(self, x):
        with pyro.plate("data", len(x)):
            noise = dist.Normal(torch.zeros(len(x)), 1.0)
            noise = pyro.sample("noise", noise, infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(self.w * x + 0.8 * noise))
            pyro.factor("log_q", torch.full_like(x, -math.log(0.8)), has_rsample=True)


@pytest.mark.parametrize(
    ("model", "guide", "message"),
    [
        (Likelihood, Normal, "Factor 'log_px' of the model: .* the model observes nothing else"),
        (Observing, FlowByHand, "Factor 'log_q' of the guide: .* site 'z' is a point without a density"),
    ],
)
def test_a_factor_that_may_be_a_density_is_refused_and_trains(model, guide, message):
    pair, x = (model(), guide()), torch.randn(6)
    for tool in (pv.log_evidence, pv.elbo_terms):
        with pytest.raises(ValueError, match=message):
            tool(*pair, x)
    training = pv.fit(svi(pair), [x, x], 3, progress=False)
    with pytest.warns(UserWarning, match="fit trains, but records no ELBO. " + message) as warned:
        records = list(training)
    assert len(warned) == 1
    for record in records:
        assert math.isfinite(record.loss)
        assert math.isnan(record.elbo)
        assert math.isnan(record.kl)
