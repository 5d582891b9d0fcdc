"""Modules that return a distribution: likelihoods p(x | z), posteriors q(z | x) and priors p(z)."""

from pyro_vae.distributions.family import Family
from pyro_vae.distributions.flows import CouplingFlow
from pyro_vae.distributions.likelihoods import (
    Bernoulli,
    Categorical,
    ContinuousBernoulli,
    DiscretizedLogistic,
    FixedSigma,
    Gaussian,
    LearnedSigma,
    PixelSigma,
)
from pyro_vae.distributions.posteriors import DiagNormal, FlowNormal, FullNormal
from pyro_vae.distributions.priors import FlowPrior, MixturePrior, StandardNormal, VampPrior

__all__ = [
    "Bernoulli",
    "Categorical",
    "ContinuousBernoulli",
    "CouplingFlow",
    "DiagNormal",
    "DiscretizedLogistic",
    "Family",
    "FixedSigma",
    "FlowNormal",
    "FlowPrior",
    "FullNormal",
    "Gaussian",
    "LearnedSigma",
    "MixturePrior",
    "PixelSigma",
    "StandardNormal",
    "VampPrior",
]
