"""Plates, masks and scales under the objectives of this package."""

import re
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from every_objective import EVERY, every
from exact_bounds import weighted_loss
from gaussian_pairs import Plated, outer, subsampled, whole
from pyro import poutine

import pyro_vae as pv


@every
def test_the_scale_of_a_subsampled_plate_stands_before_the_logarithm(elbo):
    x = torch.randn(4, 3, dtype=torch.float64)
    torch.testing.assert_close(
        weighted_loss(Plated(subsampled), elbo, x), 10 / 4 * weighted_loss(Plated(whole), elbo, x)
    )


@every
def test_a_plate_inside_a_data_point_is_an_event(elbo):
    x = torch.randn(4, 3, dtype=torch.float64)
    inner, event = Plated(outer, inner=True), Plated(whole)
    if isinstance(elbo, pv.FreeBits):
        elbo = pv.FreeBits(0.0, 3)  # its groups are the members of the plate
    torch.testing.assert_close(weighted_loss(inner, elbo, x), weighted_loss(event, elbo, x))


@every
def test_a_masked_data_point_counts_for_nothing(elbo):
    x = torch.randn(4, 3, dtype=torch.float64)
    mask = torch.tensor([True, False, True, True])
    found = weighted_loss(Plated(whole, mask=mask), elbo, x)
    other = torch.where(mask.unsqueeze(-1), x, -x)
    torch.testing.assert_close(found, weighted_loss(Plated(whole, mask=mask), elbo, other))
    if not isinstance(elbo, pv.FreeBits):  # which is not a sum over the data
        rest = weighted_loss(Plated(whole, mask=~mask), elbo, x)
        torch.testing.assert_close(found + rest, weighted_loss(Plated(whole), elbo, x))


# Sites that do not fit.


def inner_subsampled(x):
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0))
        with pyro.plate("pixels", 6, subsample_size=3, dim=-1) as i:
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, i])


def weighted_observation(x):
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0))
        with poutine.scale(scale=0.5):
            pyro.sample("x", dist.Normal(z.expand(len(x), 6), 1.0).to_event(1), obs=x)


def plain(x, size=None):
    with pyro.plate("data", size or len(x), subsample_size=len(x), dim=-2):
        pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 1.0))


def outside(x):
    pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))


def outside_and_observed(x):
    outside(x)
    with pyro.plate("data", len(x), dim=-2):
        pyro.sample("x", dist.Normal(torch.zeros(len(x), 6), 1.0), obs=x)


def joint(x):
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0))
        pyro.sample("x", dist.Normal(z.expand(len(x), 6), 1.0), obs=x)


def subsampled_joint(x):
    with pyro.plate("data", 9, subsample_size=len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 1.0))
        pyro.sample("x", dist.Normal(z.expand(len(x), 6), 1.0).to_event(1), obs=x[:, None])


def point(x):
    with pyro.plate("data", len(x), dim=-2):
        pyro.sample("z", dist.Delta(torch.zeros(len(x), 1)))


def poisson(x):
    with pyro.plate("data", len(x), dim=-2):
        pyro.sample("z", dist.Poisson(torch.ones(1)))


def counts(x):
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", dist.Poisson(torch.ones(1)))
        pyro.sample("x", dist.Normal(z.expand(len(x), 6), 1.0), obs=x)


def without(x):
    pass


PER_DATA_POINT = ("IWAE", "Renyi", "DReG", "IWAE, one by one")


NEED_PATHS = ("STL", "DReG", "DReG, one by one")


@pytest.mark.parametrize(
    ("model", "guide", "names", "message"),
    [
        (
            inner_subsampled,
            plain,
            PER_DATA_POINT,
            "Site 'x': expected its other plates to be whole, got 'pixels' with 3 of 6",
        ),
        (
            weighted_observation,
            plain,
            PER_DATA_POINT,
            "Site 'x', observed: expected the scale 1.0 of its plate 'data', got 0.5",
        ),
        (
            outside_and_observed,
            outside,
            PER_DATA_POINT,
            "Site 'z': expected it inside the plate 'data', got the plates none",
        ),
        (
            joint,
            partial(plain, size=9),
            EVERY,
            "'z': expected the same scale in model and guide, got 1.0 in the model and 2.25 in the guide",
        ),
        (
            subsampled_joint,
            point,
            PER_DATA_POINT,
            "The plate 'data': expected one scale for all sites, got [1.0, 2.25]",
        ),
        (joint, poisson, EVERY, "Site 'z': expected probabilities in model and guide, or densities in both"),
        (
            counts,
            poisson,
            NEED_PATHS,
            "Site 'z' of the guide, Poisson: expected a distribution with rsample",
        ),
        (
            joint,
            without,
            EVERY,
            "the same in model and guide, got ['z'] only in the model and none only in the guide",
        ),
        (
            joint,
            poutine.mask(plain, mask=torch.eye(4)[:, :1] > 0),
            EVERY,
            "Site 'z': expected the same mask in model and guide, got different ones",
        ),
    ],
)
def test_what_would_be_wrong_is_refused(model, guide, names, message):
    x = torch.zeros(4, 6)
    for name in names:
        with pytest.raises(ValueError, match=re.escape(message)):
            EVERY[name].differentiable_loss(model, guide, x)
