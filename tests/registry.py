"""One line here buys a new family, prior or pair every contract test."""

import torch
from torch import nn

import pyro_vae as pv

LIKELIHOODS = {
    "bernoulli": pv.Bernoulli,
    "gaussian": lambda: pv.Gaussian(0.3),
    "gaussian-learned": lambda: pv.Gaussian(pv.LearnedSigma()),
    "gaussian-pixel": lambda: pv.Gaussian(pv.PixelSigma()),
    "continuous-bernoulli": pv.ContinuousBernoulli,
    "categorical": lambda: pv.Categorical(5),
    "discretized-logistic": lambda: pv.DiscretizedLogistic(16),
}

POSTERIORS = {
    "diag-normal": pv.DiagNormal,
    "full-normal": pv.FullNormal,
}

FAMILIES = LIKELIHOODS | POSTERIORS

PRIORS = {
    "standard-normal": lambda: pv.StandardNormal(3),
    "mixture": lambda: pv.MixturePrior(3, 4),
    "vamp": lambda: pv.VampPrior(encoder(pv.DiagNormal(), dim=3), torch.rand(4, 6)),
    "vamp-full": lambda: pv.VampPrior(encoder(pv.FullNormal(), dim=3), torch.rand(4, 6)),
    "vamp-flow": lambda: pv.VampPrior(encoder(pv.FlowNormal(3, 2, 8, 4), dim=3), torch.rand(4, 6)),
    "flow": lambda: pv.FlowPrior(3, 2, 8),
}


def encoder(family, width=6, dim=2):
    return nn.Sequential(pv.MLP(width, 5, family.num_features(dim)), family)


def structure(family=pv.DiagNormal, prior=lambda q: pv.StandardNormal(2)):
    """A pair of width 6 and two latent dimensions, its flows away from the identity."""

    def make():
        q = encoder(family())
        decoder = nn.Sequential(pv.MLP(2, 5, 6), pv.Bernoulli())
        model, guide = pv.Model(prior(q), decoder), pv.Guide(q)
        return unsettled(model), unsettled(guide)

    return make


def unsettled(module):
    """Move the parameters that start at zero, so that a flow is no identity."""
    for p in module.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.1)
    return module


def convolutional():
    encoder = nn.Sequential(pv.ConvDown((1, 2, 4), 3, num_features=4), pv.DiagNormal())
    decoder = nn.Sequential(pv.ConvUp(2, 3, shape=(1, 2, 4)), pv.Bernoulli())
    return pv.Model(pv.StandardNormal(2), decoder), pv.Guide(encoder)


# Pairs whose structure goes beyond a family: name -> (() -> (model, guide), the width of x).
STRUCTURES = {
    "mixture-prior": (structure(prior=lambda q: pv.MixturePrior(2, 3)), 6),
    "vamp-prior": (structure(prior=lambda q: pv.VampPrior(q, torch.rand(3, 6))), 6),
    "flow-prior": (structure(prior=lambda q: pv.FlowPrior(2, 1, 8)), 6),
    "flow-posterior": (structure(lambda: pv.FlowNormal(2, 1, 8, 4)), 6),
    "convolutional": (convolutional, 8),
}


def pair(likelihood="bernoulli", posterior="diag-normal", width=6, dim=2, hidden=5):
    """Build a small model and guide of registered families."""
    decoder_family, encoder_family = FAMILIES[likelihood](), FAMILIES[posterior]()
    decoder = nn.Sequential(pv.MLP(dim, hidden, decoder_family.num_features(width)), decoder_family)
    encoder = nn.Sequential(pv.MLP(width, hidden, encoder_family.num_features(dim)), encoder_family)
    return pv.Model(pv.StandardNormal(dim), decoder), pv.Guide(encoder)


def data(likelihood="bernoulli", size=8, width=6):
    """Draw data inside the likelihood's support."""
    x = torch.rand(size, width)
    if likelihood == "bernoulli":
        return x.round()
    levels = {"categorical": 5, "discretized-logistic": 16}.get(likelihood)
    return (x * (levels - 1)).round() / (levels - 1) if levels else x
