"""Posteriors: families for q(z | x), the distribution of the latent given an image."""

import math
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import AffineTransform

from pyro_vae.distributions.family import (
    Family,
    at_least_float32,
    check_bounds,
    check_features,
    check_floats,
    sigmoid_between,
)
from pyro_vae.distributions.flows import CouplingFlow


class DiagNormal(Family):
    r"""The factorised Gaussian :math:`N(\mu, \mathrm{diag}\,\sigma^2)`; the features are mu and log sigma.

    As q(z | x) it is the usual inference model, z = mu + sigma * eps with eps ~ N(0, I).

    Without bounds, log sigma is the output of the network. On large inputs, such as raw counts, it can be
    -100, and sigma is 0. Then scale the input of the encoder, by log1p for counts. Or bound log sigma:
    ``DiagNormal(bounds=(-6, 2))``.

    Args:
        bounds: the bounds on log sigma, between which a sigmoid keeps it; by default none.

    Shape:
        features ``(*batch, 2 D)``; event ``(D,)``.

    Raises:
        ValueError: if the bounds are not finite or not in order; in ``forward``, if the width is odd.

    References:
        Kingma and Welling 2013, arXiv 1312.6114.
    """

    def __init__(self, bounds: tuple[float, float] | None = None) -> None:
        super().__init__()
        self.bounds = None if bounds is None else check_bounds(bounds)

    def num_features(self, event_size: int) -> int:
        """Return 2 D: a mean and a log sigma per dimension."""
        return 2 * event_size

    def forward(self, features: Tensor) -> TorchDistribution:
        """Return N(mu, diag sigma^2)."""
        mean, log_sigma = check_features(features, 2, "DiagNormal").chunk(2, -1)
        if self.bounds is not None:
            log_sigma = sigmoid_between(self.bounds, log_sigma)
        return dist.Normal(mean, log_sigma.exp()).to_event(1)


class _MultivariateNormal(dist.MultivariateNormal):
    """Draws in full precision. Under autocast, a draw would be of another distribution than its log_prob."""

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        with torch.autocast(self.loc.device.type, enabled=False):
            draw: Tensor = super().rsample(torch.Size(sample_shape))
            return draw


class FullNormal(Family):
    r"""The Gaussian :math:`N(\mu, L L^T)` with any covariance; L is its Cholesky factor.

    :math:`L = \mathrm{diag}(\sigma)\, U`. The features are mu, log sigma, and the entries of U below its unit
    diagonal, row by row. If these entries are zero, it is :class:`DiagNormal`. They are in units of sigma
    because a posterior is narrow. If the network gave the entries of L itself, its small errors would be
    large compared with sigma.

    Shape:
        features ``(*batch, D + D (D + 1) / 2)``; event ``(D,)``.

    Raises:
        ValueError: in ``forward``, if the width is not D + D (D + 1) / 2 for any D.

    References:
        Kingma and Welling 2019, section 2.5.1, arXiv 1906.02691.
    """

    def num_features(self, event_size: int) -> int:
        """Return D + D (D + 1) / 2: a mean per dimension and a Cholesky factor."""
        return event_size * (event_size + 3) // 2

    def forward(self, features: Tensor) -> TorchDistribution:
        """Return N(mu, L L^T)."""
        check_floats("FullNormal", features)
        width = features.shape[-1] if features.dim() else 0
        size = (math.isqrt(9 + 8 * width) - 3) // 2
        if not size or self.num_features(size) != width:
            raise ValueError(
                f"FullNormal: expected features of shape (*batch, D + D (D + 1) / 2), got "
                f"{tuple(features.shape)}. To fix: end the network before it in num_features(D) features."
            )
        features = at_least_float32(features)
        mean, log_sigma, lower = features.split([size, size, size * (size - 1) // 2], -1)
        # Every entry of U is picked from [0, 1, lower]. Nothing is written in place, because the tracking of
        # dependencies between sites does not see such writes.
        zero = torch.zeros_like(mean[..., :1])
        entries = torch.cat([zero, zero + 1, lower], -1)
        on = features.device
        position = torch.eye(size, dtype=torch.long, device=on)
        rows, columns = torch.tril_indices(size, size, offset=-1, device=on)
        position[rows, columns] = torch.arange(2, 2 + len(rows), device=on)
        scale_tril = log_sigma.exp().unsqueeze(-1) * entries[..., position]
        return _MultivariateNormal(mean, scale_tril=scale_tril)


class FlowNormal(Family):
    r"""A normalising flow around the factorised Gaussian, :math:`z = \mu + \sigma f_h(\epsilon)`.

    epsilon ~ N(0, I), and f_h is an invertible map that depends on x through the context h. The features are
    mu, log sigma and h. It starts as :class:`DiagNormal`, with f the identity. Neither its mean nor its KL to
    any prior has a closed form, so ELBOs estimate the KL by Monte Carlo.

    The flow acts on epsilon, not on z: epsilon has unit size for any mu and sigma.

    Args:
        dim: D, two or more.
        steps: the number of steps of the flow; each step moves every dimension.
        hidden: the width of the hidden layers of its networks.
        context: the width of h.

    Shape:
        features ``(*batch, 2 D + context)``; event ``(D,)``.

    Raises:
        ValueError: as :class:`CouplingFlow`; from ``num_features``, if the event size is not D; in
            ``forward``, if the width is not 2 D + context.

    References:
        Rezende and Mohamed 2015, arXiv 1505.05770; Dinh et al. 2017, arXiv 1605.08803.
    """

    def __init__(self, dim: int, steps: int = 4, hidden: int = 64, context: int = 32) -> None:
        super().__init__()
        self.widths = [dim, dim, context]
        self.flow = CouplingFlow(dim, steps, hidden, context)

    def num_features(self, event_size: int) -> int:
        """Return 2 D + context: a mean and a log sigma per dimension, and the context."""
        if event_size != self.widths[0]:
            raise ValueError(
                f"FlowNormal({self.widths[0]}): expected an event of {self.widths[0]} dimensions, got "
                f"{event_size}. To fix: write FlowNormal({event_size})."
            )
        return sum(self.widths)

    def forward(self, features: Tensor) -> TorchDistribution:
        """Return the distribution of mu + sigma f_h(epsilon)."""
        check_floats("FlowNormal", features)
        if features.shape[-1:] != (sum(self.widths),):
            raise ValueError(
                f"FlowNormal: expected features of shape (*batch, {sum(self.widths)}), mu and log sigma of "
                f"{self.widths[0]} dimensions, then a context of {self.widths[2]}, got "
                f"{tuple(features.shape)}. To fix: end the network before it in num_features(D) features."
            )
        mean, log_sigma, context = at_least_float32(features).split(self.widths, -1)
        base = dist.Normal(torch.zeros_like(mean), torch.ones_like(mean)).to_event(1)
        # The cache keeps the drawn epsilon for log_prob, which then inverts nothing.
        shift_and_scale = AffineTransform(mean, log_sigma.exp(), event_dim=1, cache_size=1)
        return dist.TransformedDistribution(base, [*self.flow(context), shift_and_scale])
