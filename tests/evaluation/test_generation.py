"""generate and reconstruct."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from mixture_pairs import CENTRES, Mixture, components
from pyro.nn import PyroModule

import pyro_vae as pv
from pyro_vae.evaluation import references


def test_generation_ignores_the_data_and_follows_the_prior():
    model, _ = references.linear_gaussian(sigma=0.1)
    x = torch.full((20_000, 5), 7.0, dtype=torch.float64)
    drawn = pv.generate(model, x)["x"].sample()
    weight, bias = model.decoder[0].weight.detach(), model.decoder[0].bias.detach()
    covariance = weight @ weight.T + 0.01 * torch.eye(5)
    torch.testing.assert_close(drawn.mean(0), bias, atol=0.05, rtol=0)
    torch.testing.assert_close(drawn.T.cov(), covariance, atol=0.05, rtol=0.05)


@pytest.fixture
def linear():
    model, guide = references.linear_gaussian()
    references.set_to_posterior(model, guide, spread=1.3)
    return model, guide, torch.randn(50, 5, dtype=torch.float64)


def test_reconstruction_goes_through_the_guide(linear):
    model, guide, x = linear
    torch.manual_seed(2)
    reconstructed = pv.reconstruct(model, guide, x)["x"].mean
    torch.manual_seed(2)
    z = guide.encoder(x).rsample()
    torch.testing.assert_close(reconstructed, model.decoder(z).mean)


class Exact(PyroModule):
    """p(z | x) of the mixture."""

    def forward(self, x):
        k = torch.arange(3)
        posteriors = dist.Normal((CENTRES * 4 + x[:, None] - k) / 5, math.sqrt(0.2))
        with pyro.plate("data", len(x)):
            mixing = dist.Categorical(logits=components(x))
            pyro.sample("z", dist.MixtureSameFamily(mixing, posteriors))


def test_reconstruction_draws_an_enumerated_site_from_its_posterior():
    x = torch.full((20_000,), 1.0)
    reconstructed = pv.reconstruct(Mixture(), Exact(), x)
    assert list(reconstructed) == ["x"]
    mean = reconstructed["x"].mean
    # k | x first, then z | k, x: E[z + k | x]
    weights = components(x[:1]).softmax(-1)[0]
    k = torch.arange(3)
    expected = (weights * ((CENTRES * 4 + 1.0 - k) / 5 + k)).sum()
    assert mean.mean().item() == pytest.approx(expected.item(), abs=5 * mean.std().item() / math.sqrt(len(x)))


def test_deterministic_sites_and_factors_are_no_likelihoods():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
            pyro.deterministic("grey", 255 * z.new_ones(len(x)) / 0)
            pyro.factor("bonus", torch.zeros(len(x)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.8))

    x = torch.randn(4)
    assert list(pv.generate(model, x)) == list(pv.reconstruct(model, guide, x)) == ["x"]
    assert pv.elbo_terms(model, guide, x).elbo.isfinite().all()
