"""What a trained pair is worth: evidence, samples, latents, exact references."""

from pyro_vae.evaluation import references
from pyro_vae.evaluation.annealing import AnnealedEvidence, annealed_evidence
from pyro_vae.evaluation.evidence import ELBOTerms, LogEvidence, elbo_terms, log_evidence
from pyro_vae.evaluation.generation import generate, reconstruct
from pyro_vae.evaluation.latents import LatentTerms, latent_terms

__all__ = [
    "AnnealedEvidence",
    "ELBOTerms",
    "LatentTerms",
    "LogEvidence",
    "annealed_evidence",
    "elbo_terms",
    "generate",
    "latent_terms",
    "log_evidence",
    "reconstruct",
    "references",
]
