"""What a trained pair is worth: evidence, samples, latents, estimators side by side, exact references."""

from pyro_vae.evaluation import references
from pyro_vae.evaluation.comparison import compare_elbos
from pyro_vae.evaluation.comparison_table import Comparison
from pyro_vae.evaluation.evidence import ELBOTerms, LogEvidence, elbo_terms, log_evidence
from pyro_vae.evaluation.explanation import Explanation, Term, explain
from pyro_vae.evaluation.generation import generate, reconstruct
from pyro_vae.evaluation.latents import LatentTerms, latent_terms

__all__ = [
    "Comparison",
    "ELBOTerms",
    "Explanation",
    "LatentTerms",
    "LogEvidence",
    "Term",
    "compare_elbos",
    "elbo_terms",
    "explain",
    "generate",
    "latent_terms",
    "log_evidence",
    "reconstruct",
    "references",
]
