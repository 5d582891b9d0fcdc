"""One step of any ELBO as one graph of tensor operations: all that is private to torch is in here."""

from pyro_vae.compiled.elbo import CompiledELBO

__all__ = ["CompiledELBO"]
