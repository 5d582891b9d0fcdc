"""Families map features to a distribution.

A conditional distribution is any module whose ``forward`` returns a distribution. There is no other
protocol. Put a network in front of a family to get a decoder, p(x | z), or an encoder, q(z | x)::

    decoder = nn.Sequential(MLP(20, 400, 784), Bernoulli())
    encoder = nn.Sequential(MLP(784, 400, 2 * 20), DiagNormal())

The last dimension of the features becomes the one event dimension. All other dimensions are batch
dimensions. Every ``log_prob`` is a log density or a log mass in nats, with all its constants.
"""

from abc import ABC, abstractmethod

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn

from pyro_vae.arguments import check_tensor, given, is_finite, require

LOG_SIGMA_BOUNDS = (-6.0, 2.0)


class Family(nn.Module, ABC):
    """The base class of the families of this package.

    Your own family does not need it: any module whose ``forward`` returns a distribution is a family.
    """

    @abstractmethod
    def num_features(self, event_size: int) -> int:
        """Return the number of features that describe an event of ``event_size`` dimensions."""

    @abstractmethod
    def forward(self, features: Tensor) -> TorchDistribution:
        """Return the distribution: features ``(*batch, F)``, event shape ``(D,)``."""


def check_features(features: Tensor, per_dimension: int, family: str) -> Tensor:
    """Return features ``(*batch, per_dimension * D)`` in float32 or wider.

    Raises:
        ValueError: if the width is not a positive multiple of ``per_dimension``.
    """
    check_floats(family, features)
    if not features.dim() or features.shape[-1] % per_dimension or not features.shape[-1]:
        raise ValueError(
            f"{family}: expected features of shape (*batch, {per_dimension} * D), got "
            f"{tuple(features.shape)}. To fix: end the network before it in {per_dimension} * D features."
        )
    return at_least_float32(features)


def check_floats(family: str, features: Tensor) -> None:
    """Refuse features that are not a tensor of real numbers."""
    odd = not isinstance(features, Tensor) or features.is_complex() or features.is_quantized
    if odd or features.layout != torch.strided:
        check_tensor(f"{family}, features", features)


def at_least_float32(features: Tensor) -> Tensor:
    """Return the features, in float32 if they are 16-bit, as under autocast.

    In 16 bits a log probability would be wrong by nats.
    """
    return features.float() if features.dtype in (torch.bfloat16, torch.float16) else features


def sigmoid_between(bounds: tuple[float, float], x: Tensor) -> Tensor:
    """Map the real line smoothly onto the open interval between the bounds; 0 goes to its middle."""
    low, high = bounds
    return low + (high - low) * torch.sigmoid(x)


def check_bounds(bounds: tuple[float, float]) -> tuple[float, float]:
    """Return the bounds on log sigma.

    Raises:
        ValueError: if they are not finite or not in order.
    """
    two = isinstance(bounds, tuple | list) and len(bounds) == 2 and all(map(is_finite, bounds))
    expected = "two finite numbers, low < high, the bounds on log sigma"
    to_fix = f"write bounds={LOG_SIGMA_BOUNDS}, for example"
    require(two and bounds[0] < bounds[1], "bounds", expected, given(bounds), to_fix)
    return float(bounds[0]), float(bounds[1])
