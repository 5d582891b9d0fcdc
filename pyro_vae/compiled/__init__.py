"""One step of any ELBO as one graph of tensor operations; all that is private to torch is in this folder."""

from pyro_vae.compiled.elbo import CompiledELBO
from pyro_vae.compiled.graph import CapturedGraph

__all__ = ["CapturedGraph", "CompiledELBO"]
