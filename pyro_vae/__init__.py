"""Variational autoencoders written as probabilistic programs in Pyro."""

from pyro_vae import data, plots, references
from pyro_vae.comparison import Comparison, compare_elbos
from pyro_vae.compiled import CompiledELBO
from pyro_vae.evaluation import (
    ELBOTerms,
    LogEvidence,
    elbo_terms,
    generate,
    log_evidence,
    reconstruct,
)
from pyro_vae.explanation import Explanation, Term, explain
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
from pyro_vae.handlers import scale_latents
from pyro_vae.importance import IWAE, STL, DReG, Renyi
from pyro_vae.kl import FreeBits, MeanField
from pyro_vae.latents import LatentTerms, latent_terms
from pyro_vae.models import Guide, Model
from pyro_vae.networks import MLP, ConvDown, ConvUp
from pyro_vae.pairs import parameters
from pyro_vae.priors import FlowPrior, MixturePrior, StandardNormal, VampPrior
from pyro_vae.svi import SVI
from pyro_vae.training import Epoch, fit

__version__ = "0.1.0"

__all__ = [
    "IWAE",
    "MLP",
    "STL",
    "SVI",
    "Bernoulli",
    "Categorical",
    "Comparison",
    "CompiledELBO",
    "ContinuousBernoulli",
    "ConvDown",
    "ConvUp",
    "CouplingFlow",
    "DReG",
    "DiagNormal",
    "DiscretizedLogistic",
    "ELBOTerms",
    "Epoch",
    "Explanation",
    "Family",
    "FixedSigma",
    "FlowNormal",
    "FlowPrior",
    "FreeBits",
    "FullNormal",
    "Gaussian",
    "Guide",
    "LatentTerms",
    "LearnedSigma",
    "LogEvidence",
    "MeanField",
    "MixturePrior",
    "Model",
    "PixelSigma",
    "Renyi",
    "StandardNormal",
    "Term",
    "VampPrior",
    "compare_elbos",
    "data",
    "elbo_terms",
    "explain",
    "fit",
    "generate",
    "latent_terms",
    "log_evidence",
    "parameters",
    "plots",
    "reconstruct",
    "references",
    "scale_latents",
]
