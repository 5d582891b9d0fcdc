"""Variational autoencoders written as probabilistic programs in Pyro."""

import importlib
from typing import TYPE_CHECKING, Any

from pyro_vae import data
from pyro_vae.distributions import (
    Bernoulli,
    Categorical,
    ContinuousBernoulli,
    CouplingFlow,
    DiagNormal,
    DiscretizedLogistic,
    Family,
    FixedSigma,
    FlowNormal,
    FlowPrior,
    FullNormal,
    Gaussian,
    LearnedSigma,
    MixturePrior,
    PixelSigma,
    StandardNormal,
    VampPrior,
)
from pyro_vae.elbos import IWAE, STL, DReG, FreeBits, MeanField, Renyi, scale_latents
from pyro_vae.estimators import Comparison, Explanation, Term, compare_elbos, explain
from pyro_vae.evaluation import (
    AnnealedEvidence,
    ELBOTerms,
    EvidenceDiagnostics,
    Imputation,
    InferenceGaps,
    KLDecomposition,
    LatentTerms,
    LogEvidence,
    annealed_evidence,
    conditional_evidence,
    elbo_terms,
    evidence_diagnostics,
    generate,
    impute,
    inference_gaps,
    kl_decomposition,
    latent_terms,
    log_evidence,
    reconstruct,
    references,
)
from pyro_vae.models import Guide, Model
from pyro_vae.networks import MLP, ConvDown, ConvUp
from pyro_vae.programs import mask_missing, parameters
from pyro_vae.svi import SVI
from pyro_vae.training import Checkpoint, Epoch, fit, write_file

if TYPE_CHECKING:
    from pyro_vae import plots
    from pyro_vae.compiled import CompiledELBO

__version__ = "0.1.0"

__all__ = [
    "IWAE",
    "MLP",
    "STL",
    "SVI",
    "AnnealedEvidence",
    "Bernoulli",
    "Categorical",
    "Checkpoint",
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
    "EvidenceDiagnostics",
    "Explanation",
    "Family",
    "FixedSigma",
    "FlowNormal",
    "FlowPrior",
    "FreeBits",
    "FullNormal",
    "Gaussian",
    "Guide",
    "Imputation",
    "InferenceGaps",
    "KLDecomposition",
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
    "annealed_evidence",
    "compare_elbos",
    "conditional_evidence",
    "data",
    "elbo_terms",
    "evidence_diagnostics",
    "explain",
    "fit",
    "generate",
    "impute",
    "inference_gaps",
    "kl_decomposition",
    "latent_terms",
    "log_evidence",
    "mask_missing",
    "parameters",
    "plots",
    "reconstruct",
    "references",
    "scale_latents",
    "write_file",
]

# What is slow to import, torch's compiler and matplotlib, is imported when it is first used.
_LATER = {"CompiledELBO": "pyro_vae.compiled", "plots": "pyro_vae.plots"}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(_LATER[name])
    return globals().setdefault(name, getattr(module, name, module))


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
