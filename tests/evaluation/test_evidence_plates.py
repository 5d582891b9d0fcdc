"""Evidence with several latent sites, plates, scales and masks, and with networks that take no particles."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from registry import data, pair
from torch import nn

import pyro_vae as pv


class TwoLayers(PyroModule):
    """p(z2) p(z1 | z2) p(x | z1), all scalar and linear-Gaussian: x ~ N(0, 3)."""

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(0.0, 1.0))
            z1 = pyro.sample("z1", dist.Normal(z2, 1.0))
            pyro.sample("x", dist.Normal(z1, 1.0), obs=x)


class TwoLayerGuide(PyroModule):
    def forward(self, x):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(0.5 * x, 1.0))
            pyro.sample("z2", dist.Normal(0.5 * z1, 1.0))


def test_several_latent_sites_scales_and_masks():
    x = torch.randn(6)
    exact = dist.Normal(0.0, math.sqrt(3.0)).log_prob(x)
    model, guide = TwoLayers(), TwoLayerGuide()
    estimate = pv.log_evidence(model, guide, x, 40_000)
    assert ((estimate.values - exact).abs() < 5 * estimate.standard_error).all()
    assert estimate.standard_error.max() < 0.03
    # a KL weight or a subsampled plate does not change the evidence of the model
    scaled = pyro.poutine.scale(model, scale=0.1), pyro.poutine.scale(guide, scale=0.1)
    estimate = pv.log_evidence(*scaled, x, 40_000)
    assert ((estimate.values - exact).abs() < 5 * estimate.standard_error).all()
    # the evidence of a masked data point is 1
    mask = torch.arange(6) % 2 == 0
    masked = pyro.poutine.mask(model, mask=mask), pyro.poutine.mask(guide, mask=mask)
    estimate = pv.log_evidence(*masked, x, 40_000)
    expected = torch.where(mask, exact, torch.zeros(6))
    assert ((estimate.values - expected).abs() < 5 * estimate.standard_error + 1e-5).all()


# The plate of the data.


class Subsampled(PyroModule):
    def __init__(self, program):
        super().__init__()
        self.program = program

    def forward(self, x):
        with pyro.plate("data", 1000, subsample_size=len(x)):
            return self.program(x)


def test_a_subsampled_data_plate_scales_no_data_point():
    class Latent(nn.Module):
        def forward(self, x):
            return pyro.sample("z", dist.Normal(x / 2, 0.8))

    class Joint(nn.Module):
        def forward(self, x):
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
            return pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.randn(10)
    estimate = pv.log_evidence(Subsampled(Joint()), Subsampled(Latent()), x, 20_000)
    exact = dist.Normal(0.0, math.sqrt(2.0)).log_prob(x)
    assert ((estimate.values - exact).abs() < 5 * estimate.standard_error).all()


def test_a_site_outside_the_data_plate_is_refused():
    def model(x):
        scale = pyro.sample("scale", dist.Gamma(2.0, 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, scale), obs=x)

    def guide(x):
        pyro.sample("scale", dist.Gamma(2.0, 2.0))

    with pytest.raises(ValueError, match="'scale': expected it inside the plate 'data', got the plates none"):
        pv.log_evidence(model, guide, torch.randn(4), 10)


def test_a_data_plate_that_is_looped_over_is_refused():
    """All the data would have one importance weight."""

    def model(x):
        for i in pyro.plate("data", len(x)):
            z = pyro.sample(f"z{i}", dist.Normal(0.0, 1.0))
            pyro.sample(f"x{i}", dist.Normal(z, 1.0), obs=x[i])

    def guide(x):
        for i in pyro.plate("data", len(x)):
            pyro.sample(f"z{i}", dist.Normal(0.5 * x[i], 0.5**0.5))

    x = torch.randn(3)
    for run in (pv.log_evidence, pv.elbo_terms, pv.latent_terms, pv.IWAE(5).loss, pv.FreeBits(0.1).loss):
        with pytest.raises(ValueError, match="'.0': expected the plate 'data' to be a dimension, got a loop"):
            run(model, guide, x)


def test_a_plate_that_draws_a_subsample_is_refused():
    def model(x):
        with pyro.plate("data", len(x), subsample_size=2) as rows:
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    def guide(x):
        with pyro.plate("data", len(x), subsample_size=2):
            pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))

    with pytest.raises(
        ValueError, match="'data': expected all 4 data points.*got a plate that draws 2 of them"
    ):
        pv.elbo_terms(model, guide, torch.randn(4))


# A plate inside it.


def test_a_plate_inside_data_is_summed():
    """x_ij ~ N(z_i, 1): the evidence of row i is N(0, I + 1 1^T)."""

    def model(x):
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0))
            with pyro.plate("parts", 3, dim=-1):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(x.mean(-1, keepdim=True), 0.8))

    x = torch.randn(4, 3)
    exact = dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + 1).log_prob(x)
    estimate = pv.log_evidence(model, guide, x, 20_000)
    assert ((estimate.values - exact).abs() < 5 * estimate.standard_error).all()


def test_a_plate_inside_data_may_be_looped_over():
    """A mixture, summed out, with two pixels in a loop."""

    def model(x, loop):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            if loop:
                for i in pyro.plate("pixels", 2):
                    pyro.sample(f"x{i}", dist.Normal(k, 1.0), obs=x[:, i])
            else:
                pyro.sample("x", dist.Normal(k.unsqueeze(-1).expand(*k.shape, 2), 1.0).to_event(1), obs=x)

    x = torch.randn(3, 2)
    found = [pv.log_evidence(model, lambda x, loop: None, (x, loop), 1).values for loop in (True, False)]
    torch.testing.assert_close(*found)


def test_a_subsampled_plate_inside_data_is_refused():
    def model(x):
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0))
            with pyro.plate("parts", 6, subsample_size=3, dim=-1):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(torch.zeros(1), 1.0))

    with pytest.raises(
        ValueError, match="'x': expected its other plates to be whole, got 'parts' with 3 of 6"
    ):
        pv.log_evidence(model, guide, torch.randn(4, 3), 10)


# A plate of particles outside it.


def side_by_side(model, guide, x):
    """Return whether two particles are drawn in a plate of their own, left of the plate "data"."""
    elbo = pv.IWAE(2)
    elbo.loss(model, guide, x)
    return {1: False, 2: True}[elbo.max_plate_nesting]


class Images(PyroModule):
    """A convolutional encoder, which a plate of particles on the left would break."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 4, 4), nn.Flatten(1))
        self.family = pv.DiagNormal()

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.family(self.net(x)))


class ConvModel(PyroModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Unflatten(1, (2, 1, 1)), nn.ConvTranspose2d(2, 1, 4), nn.Flatten(1))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", pv.StandardNormal(2)())
            pyro.sample("x", pv.Bernoulli()(self.net(z)), obs=x)


def test_a_model_without_particle_dimensions_is_evaluated_one_by_one():
    model, guide = ConvModel(), Images()
    x = data(size=3, width=16)
    assert not side_by_side(model, guide, x)
    estimate = pv.log_evidence(model, guide, x, 500)
    weights = pv.log_evidence(model, guide, x.repeat(2000, 1), 1).values.view(2000, 3)
    reference = weights.logsumexp(0) - math.log(2000)
    assert ((estimate.values - reference).abs() < 6 * estimate.standard_error).all()


class BatchNormed(PyroModule):
    """BatchNorm1d reads (particles, B, C) as B channels, which is silently wrong where B is C."""

    def __init__(self, channels):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, channels), nn.BatchNorm1d(channels), pv.Bernoulli())
        nn.init.normal_(self.net[1].weight)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", pv.StandardNormal(2)())
            pyro.sample("x", self.net(z), obs=x)


def test_a_network_that_is_silently_wrong_on_particles_is_found_out():
    model = BatchNormed(8)
    _, guide = pair(width=8)
    x = data(size=8, width=8)
    assert not side_by_side(model, guide, x)
    assert side_by_side(*pair(width=8), x)
