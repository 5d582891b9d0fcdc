"""One line here buys a new family, prior or pair every contract test."""

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
}


def pair(likelihood="bernoulli", posterior="diag-normal", width=6, dim=2, hidden=5):
    """Build a small model and guide of registered families."""
    decoder_family, encoder_family = FAMILIES[likelihood](), FAMILIES[posterior]()
    decoder = nn.Sequential(pv.MLP(dim, hidden, decoder_family.num_features(width)), decoder_family)
    encoder = nn.Sequential(pv.MLP(width, hidden, encoder_family.num_features(dim)), encoder_family)
    return pv.Model(pv.StandardNormal(dim), decoder), pv.Guide(encoder)


def data(likelihood="bernoulli", size=8, width=6):
    """Draw data inside the likelihood's support."""
    import torch

    x = torch.rand(size, width)
    if likelihood == "bernoulli":
        return x.round()
    levels = {"categorical": 5, "discretized-logistic": 16}.get(likelihood)
    return (x * (levels - 1)).round() / (levels - 1) if levels else x
