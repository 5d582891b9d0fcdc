"""Priors: distributions over latents that ask for no features."""

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn


class StandardNormal(nn.Module):
    """The prior p(z) = N(0, I).

    Args:
        dim: the number of latent dimensions D.

    Shape:
        batch ``()``, event ``(D,)``.

    Raises:
        ValueError: if dim is not a positive whole number.
    """

    zeros: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        if not isinstance(dim, int) or dim < 1:
            raise ValueError(f"StandardNormal expects a positive whole number, got {dim}.")
        # A buffer, so that the prior moves with its model; nothing to save.
        self.register_buffer("zeros", torch.zeros(dim), persistent=False)

    def forward(self) -> TorchDistribution:
        """Return N(0, I)."""
        return dist.Normal(self.zeros, torch.ones_like(self.zeros)).to_event(1)
