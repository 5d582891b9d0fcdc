"""The objectives that Pyro lacks, the KL weight, and the checks of a pair under any ELBO."""

from pyro_vae.elbos.importance import IWAE, STL, DReG, Renyi
from pyro_vae.elbos.kl_weight import scale_latents
from pyro_vae.elbos.mean_field import FreeBits, MeanField

__all__ = ["IWAE", "STL", "DReG", "FreeBits", "MeanField", "Renyi", "scale_latents"]
