"""One step of any ELBO as one graph of tensor operations; only this folder uses private names of torch."""

from pyro_vae.compiled.elbo import CompiledELBO
from pyro_vae.compiled.graph import CapturedGraph

__all__ = ["CapturedGraph", "CompiledELBO"]
