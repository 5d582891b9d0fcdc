"""What a trained pair is worth: evidence, samples, latents, exact references."""

from pyro_vae.evaluation import references
from pyro_vae.evaluation.evidence import ELBOTerms, LogEvidence, elbo_terms, log_evidence
from pyro_vae.evaluation.generation import generate, reconstruct
from pyro_vae.evaluation.latents import LatentTerms, latent_terms
from pyro_vae.evaluation.missing import Imputation, conditional_evidence, impute

__all__ = [
    "ELBOTerms",
    "Imputation",
    "LatentTerms",
    "LogEvidence",
    "conditional_evidence",
    "elbo_terms",
    "generate",
    "impute",
    "latent_terms",
    "log_evidence",
    "reconstruct",
    "references",
]
