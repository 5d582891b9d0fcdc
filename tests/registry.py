"""The registry: one line gives a new family, prior or pair every contract test."""

from functools import partial
from itertools import product

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import constraints

import pyro_vae as pv


def each_once(*axes):
    """Return the combinations of several axes: some in which every value appears; the others are proofs."""
    axes = [list(axis) for axis in axes]
    some = {tuple(axis[i % len(axis)] for axis in axes) for i in range(max(map(len, axes)))}
    return [
        pytest.param(*combination, marks=() if combination in some else pytest.mark.proofs)
        for combination in product(*axes)
    ]


# name -> (the event size D -> a family)
LIKELIHOODS = {
    "bernoulli": lambda size: pv.Bernoulli(),
    "gaussian": lambda size: pv.Gaussian(0.3),
    "gaussian-learned": lambda size: pv.Gaussian(pv.LearnedSigma()),
    "gaussian-pixel": lambda size: pv.Gaussian(pv.PixelSigma()),
    "continuous-bernoulli": lambda size: pv.ContinuousBernoulli(),
    "categorical": lambda size: pv.Categorical(5),
    "discretized-logistic": lambda size: pv.DiscretizedLogistic(16),
}

POSTERIORS = {
    "diag-normal": lambda size: pv.DiagNormal(),
    "full-normal": lambda size: pv.FullNormal(),
    "flow-normal": lambda size: unsettled(pv.FlowNormal(size, 1, 8, 4)),
}

FAMILIES = LIKELIHOODS | POSTERIORS

# name -> (the latent size D, the guide's encoder of x of width 6 -> a prior)
PRIORS = {
    "standard-normal": lambda size, encoder: pv.StandardNormal(size),
    "mixture": lambda size, encoder: unsettled(pv.MixturePrior(size, 4)),
    "vamp": lambda size, encoder: pv.VampPrior(encoder, torch.rand(4, 6)),
    "flow": lambda size, encoder: unsettled(pv.FlowPrior(size, 1, 8)),
}


def unsettled(module):
    """Draw the parameters that start at zero, so that a flow is not the identity."""
    for p in module.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.1)
    return module


def encoder(family, width=6, dim=2, hidden=5):
    """Put a network in front of a family: x of a width -> a distribution over dim dimensions."""
    return nn.Sequential(pv.MLP(width, hidden, family.num_features(dim)), family)


def pair(likelihood="bernoulli", posterior="diag-normal", width=6, dim=2, hidden=5, prior="standard-normal"):
    """Build a small model and guide of registered parts."""
    family = FAMILIES[likelihood](width)
    decoder = nn.Sequential(pv.MLP(dim, hidden, family.num_features(width)), family)
    q = encoder(FAMILIES[posterior](dim), width, dim, hidden)
    return pv.Model(PRIORS[prior](dim, q), decoder), pv.Guide(q)


def convolutional():
    encoder = nn.Sequential(pv.ConvDown((1, 2, 4), 3, num_features=4), pv.DiagNormal())
    decoder = nn.Sequential(pv.ConvUp(2, 3, shape=(1, 2, 4)), pv.Bernoulli())
    return pv.Model(pv.StandardNormal(2), decoder), pv.Guide(encoder)


# Pairs with every posterior, every prior and other networks: name -> (() -> (model, guide), the width of x)
STRUCTURES = {
    f"{posterior}, {prior}": (partial(pair, posterior=posterior, prior=prior), 6)
    for posterior, prior in [
        *((posterior, "standard-normal") for posterior in POSTERIORS),
        *(("diag-normal", prior) for prior in PRIORS),
    ]
}
STRUCTURES["convolutional"] = (convolutional, 8)


def support(p):
    """Return the constraint on a single dimension of a distribution."""
    constraint = p.support
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    return constraint


def levels(p):
    """Return K if a distribution is over the grid k / (K - 1), k = 0 .. K - 1, else None."""
    return 2 if support(p) is constraints.boolean else getattr(support(p), "levels", None)


def has_kl(q, p):
    """Say whether KL(q || p) has a closed form."""
    try:
        torch.distributions.kl_divergence(q, p)
    except NotImplementedError:
        return False
    return True


def data(likelihood="bernoulli", size=8, width=6):
    """Draw data in the support of a likelihood."""
    family = FAMILIES[likelihood](width)
    p = family(torch.zeros(family.num_features(width)))
    x = torch.rand(size, width)
    if levels(p):
        x = (x * (levels(p) - 1)).round() / (levels(p) - 1)
    return x if p.support.check(x).all() else p.sample((size,))


class PlainVAE(nn.Module):
    """The style of Pyro's tutorial: one nn.Module, two methods, pyro.module statements."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(pv.MLP(6, 5, 4), pv.DiagNormal())
        self.decoder = nn.Sequential(pv.MLP(2, 5, 6), pv.Bernoulli())

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", self.decoder(z), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.encoder(x))
