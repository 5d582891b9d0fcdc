"""A model and its guide as one object to run, and what a run shows about them."""

from pyro_vae.programs.cache import PairCache
from pyro_vae.programs.missing import mask_missing
from pyro_vae.programs.pair import Batch, Pair, Program, Traces, as_args, no_guide, parameters

__all__ = [
    "Batch",
    "Pair",
    "PairCache",
    "Program",
    "Traces",
    "as_args",
    "mask_missing",
    "no_guide",
    "parameters",
]
