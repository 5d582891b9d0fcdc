"""The pictures of a VAE: pure functions from tensors to matplotlib figures."""

from pyro_vae.plots.curves import elbo_comparison, learning_curves, signal_over_particles
from pyro_vae.plots.latents import latent_grid, latent_lines, latent_paths, latent_plane
from pyro_vae.plots.mosaics import images, interpolations, manifold, reconstructions, traversals

__all__ = [
    "elbo_comparison",
    "images",
    "interpolations",
    "latent_grid",
    "latent_lines",
    "latent_paths",
    "latent_plane",
    "learning_curves",
    "manifold",
    "reconstructions",
    "signal_over_particles",
    "traversals",
]
