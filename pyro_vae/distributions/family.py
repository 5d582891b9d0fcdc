"""Family: features to a distribution, and what all families share."""

import math
from abc import ABC, abstractmethod

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn

LOG_SIGMA_BOUNDS = (-6.0, 2.0)


class Family(nn.Module, ABC):
    """The base of this module's families: an event of D dimensions from so many features.

    It holds no protocol that others must follow: your own family is any module whose ``forward``
    returns a distribution.
    """

    @abstractmethod
    def num_features(self, event_size: int) -> int:
        """Return how many features describe an event of ``event_size`` dimensions."""

    @abstractmethod
    def forward(self, features: Tensor) -> TorchDistribution:
        """Return the distribution: features ``(*batch, F)``, event shape ``(D,)``."""


def fit_features(features: Tensor, parts: int, family: str) -> Tensor:
    """Return features (*batch, parts * D) in float32 at least, or raise a ValueError if they do not fit."""
    if not features.dim() or features.shape[-1] % parts or not features.shape[-1]:
        raise ValueError(
            f"{family} expects features of shape (*batch, {parts} * D), got "
            f"{tuple(features.shape)}. Make the network before it end in {parts} * D features."
        )
    return at_least_float32(features)


def at_least_float32(features: Tensor) -> Tensor:
    """Return features in float32 where autocast made them 16 bits: a log probability would be off by nats."""
    return features.float() if features.dtype in (torch.bfloat16, torch.float16) else features


def between(bounds: tuple[float, float], free: Tensor) -> Tensor:
    """Map the real line smoothly onto an open interval; 0 goes to its middle."""
    low, high = bounds
    return low + (high - low) * torch.sigmoid(free)


def check_bounds(bounds: tuple[float, float]) -> tuple[float, float]:
    """Return the bounds, or raise a ValueError unless they are finite and in order."""
    low, high = bounds
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"The bounds on log sigma are two finite numbers, low < high, got {bounds}.")
    return low, high
