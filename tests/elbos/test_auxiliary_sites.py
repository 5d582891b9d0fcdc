"""Auxiliary sites of the guide: the ELBO is E_q[log p(x, z) - log q(z | a) - log q(a)]."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact_bounds import check_unbiased
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from torch import nn

import pyro_vae as pv

AUXILIARY = {"is_auxiliary": True}
ELBOS = {
    "Trace_ELBO": lambda: Trace_ELBO(max_plate_nesting=1),
    "TraceMeanField_ELBO": lambda: TraceMeanField_ELBO(max_plate_nesting=1),
    "MeanField": pv.MeanField,
    "MeanField, three particles": lambda: pv.MeanField(3),
    "FreeBits": lambda: pv.FreeBits(0.0),
    "IWAE": lambda: pv.IWAE(1),
    "Renyi": lambda: pv.Renyi(1, 3),
    "STL": pv.STL,
    "DReG": lambda: pv.DReG(1),
}


def number(value):
    return torch.tensor(value, dtype=torch.float64)


class Model(PyroModule):
    """z ~ N(0, 1); x ~ N(b z, 0.7), with x of shape (N, 1)."""

    def __init__(self):
        super().__init__()
        self.b = nn.Parameter(number(0.8))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(number(0.0), 1.0))
            pyro.sample("x", dist.Normal(self.b * z, 0.7), obs=x[..., 0])


class Guide(PyroModule):
    """a ~ N(m, s); z ~ N(w x + d a, t), where a is auxiliary, and left out if asked for."""

    def __init__(self, d, auxiliary=True):
        super().__init__()
        self.m, self.w = nn.Parameter(number(0.4)), nn.Parameter(number(0.5))
        self.log_s, self.log_t = nn.Parameter(number(-0.4)), nn.Parameter(number(-0.6))
        self.d = nn.Parameter(number(d))
        self.auxiliary = auxiliary

    def forward(self, x):
        with pyro.plate("data", len(x)):
            a = number(0.0)
            if self.auxiliary:
                a = pyro.sample("a", dist.Normal(self.m, self.log_s.exp()), infer=AUXILIARY)
            pyro.sample("z", dist.Normal(self.w * x[..., 0] + self.d * a, self.log_t.exp()))


def exact_elbo(model, guide, x):
    """The ELBO in closed form, (N,): E_q[log p(x, z)] and the entropies of q(z | a) and q(a)."""
    s, t = guide.log_s.exp(), guide.log_t.exp()
    mean = guide.w * x[:, 0] + guide.d * guide.m  # of q(z), which is Gaussian
    variance = t**2 + (guide.d * s) ** 2
    log_prior = -0.5 * (math.log(2 * math.pi) + mean**2 + variance)
    error = (x[:, 0] - model.b * mean) ** 2 + model.b**2 * variance
    log_likelihood = -0.5 * (math.log(2 * math.pi) + error / 0.7**2) - math.log(0.7)
    half = 0.5 * math.log(2 * math.pi * math.e)
    entropy_of_z, entropy_of_a = half + guide.log_t, half + guide.log_s
    return log_prior + log_likelihood + entropy_of_z + entropy_of_a


@pytest.mark.parametrize("d", [0.0, 0.7], ids=["z without a", "z given a"])
@pytest.mark.parametrize("name", ELBOS)
def test_value_and_gradient_are_the_closed_form(name, d):
    model, guide = Model(), Guide(d)
    x = torch.randn(3, 1, dtype=torch.float64)
    check_unbiased(ELBOS[name](), model, guide, x, exact_elbo(model, guide, x), copies=2000, noise=0.1)


@pytest.mark.parametrize("name", ELBOS)
def test_an_independent_auxiliary_site_adds_its_entropy(name):
    """Drawn after z, it leaves the noise of z as it is. It is uniform, so that its log q has no noise."""

    def guide(auxiliary):
        def run(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(0.5 * x[..., 0], 0.6))
                if auxiliary:
                    pyro.sample("a", dist.Uniform(number(1.0), 4.0), infer=AUXILIARY)

        return run

    model, x = Model(), torch.randn(50, 1, dtype=torch.float64)
    losses = []
    for auxiliary in (False, True):
        torch.manual_seed(0)
        losses.append(float(ELBOS[name]().loss(model, guide(auxiliary), x)))
    assert losses[1] == pytest.approx(losses[0] - 50 * math.log(3), rel=1e-9)


@pytest.mark.parametrize("name", ELBOS)
def test_masks_and_scales_reach_it(name):
    model, guide = Model(), Guide(0.7)
    x, mask = torch.randn(4, 1, dtype=torch.float64), torch.tensor([True, False, True, True])
    optimizer = torch.optim.SGD(pv.parameters(model, guide), lr=0.0)
    losses = {}
    for kept in (mask, ~mask, torch.ones(4, dtype=torch.bool)):
        masked = [poutine.mask(program, mask=kept) for program in (model, guide)]
        torch.manual_seed(0)
        losses[int(kept.sum())] = pv.SVI(*masked, optimizer, loss=ELBOS[name]()).step(x)
    assert losses[3] + losses[1] == pytest.approx(losses[4])
    scaled = [poutine.scale(program, scale=0.25) for program in (model, guide)]
    if name not in ("IWAE", "Renyi", "DReG"):  # which take a scale of the plate only
        torch.manual_seed(0)
        assert pv.SVI(*scaled, optimizer, loss=ELBOS[name]()).step(x) == pytest.approx(losses[4] / 4)


# A point that depends on an auxiliary site, as an autoguide draws it.


def constrained(x):
    with pyro.plate("data", len(x)):
        s = pyro.sample("s", dist.LogNormal(number(0.3), 0.7))
        pyro.sample("x", dist.Normal(number(0.0), s), obs=x[..., 0])


def log_normal(guide):
    """The distribution that AutoNormal draws of a positive latent: exp of a Gaussian."""

    def run(x):
        loc, scale = (getattr(guide, name).s.detach() for name in ("locs", "scales"))
        with pyro.plate("data", len(x)):
            pyro.sample("s", dist.LogNormal(loc, scale))

    return run


@pytest.mark.parametrize(
    "name",
    [
        "Trace_ELBO",
        "IWAE",
        "STL",
        "DReG",
        "MeanField",
        "FreeBits",
    ],
)
def test_an_autoguide_of_a_positive_latent_is_a_log_normal(name):
    guide = AutoNormal(constrained)
    x = torch.randn(4, 1, dtype=torch.float64)
    guide(x)
    losses = []
    for elbo, program in ((ELBOS[name](), guide), (Trace_ELBO(), log_normal(guide))):
        torch.manual_seed(0)
        losses.append(float(elbo.loss(constrained, program, x)))
    assert losses[0] == pytest.approx(losses[1])
