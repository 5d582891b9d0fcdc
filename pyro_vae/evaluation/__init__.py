"""How good a trained pair is: evidence, samples, latents, exact references."""

from pyro_vae.evaluation import references
from pyro_vae.evaluation.annealing import AnnealedEvidence, annealed_evidence
from pyro_vae.evaluation.decomposition import KLDecomposition, kl_decomposition
from pyro_vae.evaluation.diagnostics import EvidenceDiagnostics, evidence_diagnostics
from pyro_vae.evaluation.evidence import ELBOTerms, LogEvidence, elbo_terms, log_evidence
from pyro_vae.evaluation.gaps import InferenceGaps, inference_gaps
from pyro_vae.evaluation.generation import generate, reconstruct
from pyro_vae.evaluation.latents import LatentTerms, latent_terms
from pyro_vae.evaluation.missing import Imputation, conditional_evidence, impute

__all__ = [
    "AnnealedEvidence",
    "ELBOTerms",
    "EvidenceDiagnostics",
    "Imputation",
    "InferenceGaps",
    "KLDecomposition",
    "LatentTerms",
    "LogEvidence",
    "annealed_evidence",
    "conditional_evidence",
    "elbo_terms",
    "evidence_diagnostics",
    "generate",
    "impute",
    "inference_gaps",
    "kl_decomposition",
    "latent_terms",
    "log_evidence",
    "reconstruct",
    "references",
]
