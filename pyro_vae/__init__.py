"""Variational autoencoders written as probabilistic programs in Pyro."""

from pyro_vae import data, plots
from pyro_vae.compiled import CompiledELBO
from pyro_vae.evaluation import (
    ELBOTerms,
    LatentTerms,
    LogEvidence,
    elbo_terms,
    generate,
    latent_terms,
    log_evidence,
    reconstruct,
)
from pyro_vae.families import (
    Bernoulli,
    Categorical,
    ContinuousBernoulli,
    DiagNormal,
    DiscretizedLogistic,
    Family,
    FixedSigma,
    FlowNormal,
    FullNormal,
    Gaussian,
    LearnedSigma,
    PixelSigma,
)
from pyro_vae.flows import CouplingFlow
from pyro_vae.models import Guide, Model
from pyro_vae.networks import MLP, ConvDown, ConvUp
from pyro_vae.pairs import parameters
from pyro_vae.priors import FlowPrior, MixturePrior, StandardNormal, VampPrior
from pyro_vae.svi import SVI
from pyro_vae.training import Epoch, fit

__version__ = "0.1.0"

__all__ = [
    "MLP",
    "SVI",
    "Bernoulli",
    "Categorical",
    "CompiledELBO",
    "ContinuousBernoulli",
    "ConvDown",
    "ConvUp",
    "CouplingFlow",
    "DiagNormal",
    "DiscretizedLogistic",
    "ELBOTerms",
    "Epoch",
    "Family",
    "FixedSigma",
    "FlowNormal",
    "FlowPrior",
    "FullNormal",
    "Gaussian",
    "Guide",
    "LatentTerms",
    "LearnedSigma",
    "LogEvidence",
    "MixturePrior",
    "Model",
    "PixelSigma",
    "StandardNormal",
    "VampPrior",
    "data",
    "elbo_terms",
    "fit",
    "generate",
    "latent_terms",
    "log_evidence",
    "parameters",
    "plots",
    "reconstruct",
]
