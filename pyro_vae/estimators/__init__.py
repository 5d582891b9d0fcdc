"""Estimators of a bound, side by side and term by term."""

from pyro_vae.estimators.comparison import compare_elbos
from pyro_vae.estimators.comparison_table import Comparison
from pyro_vae.estimators.explanation import Explanation, Term, explain

__all__ = ["Comparison", "Explanation", "Term", "compare_elbos", "explain"]
