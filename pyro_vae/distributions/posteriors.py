"""Posteriors: features to q(z | x)."""

import math

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import AffineTransform

from pyro_vae.distributions.family import Family, at_least_float32, fit_features
from pyro_vae.distributions.flows import CouplingFlow


class DiagNormal(Family):
    r"""The factorised Gaussian :math:`N(\mu, \mathrm{diag}\,\sigma^2)`, features (mu, log sigma).

    As q(z | x) it is the usual inference model, z = mu + sigma * eps with eps ~ N(0, I).

    Shape:
        features ``(*batch, 2 D)``; event ``(D,)``.

    Raises:
        ValueError: in ``forward``, if the width is odd.

    References:
        Kingma and Welling 2013, arXiv 1312.6114.
    """

    def num_features(self, event_size: int) -> int:
        """A mean and a log sigma a dimension."""
        return 2 * event_size

    def forward(self, features: Tensor) -> TorchDistribution:
        """Return N(mu, diag sigma^2)."""
        mean, log_sigma = fit_features(features, 2, "DiagNormal").chunk(2, -1)
        return dist.Normal(mean, log_sigma.exp()).to_event(1)


class FullNormal(Family):
    r"""The Gaussian :math:`N(\mu, L L^T)` with any covariance, by its Cholesky factor L.

    :math:`L = \mathrm{diag}(\sigma)\, U`; features are mu, log sigma, and the entries of U below its unit
    diagonal, row by row: with the last of them zero it is :class:`DiagNormal`. They are in units of sigma,
    since a posterior is narrow: as entries of L itself, small errors of the network would drown what it
    has learned.

    Shape:
        features ``(*batch, D + D (D + 1) / 2)``; event ``(D,)``.

    Raises:
        ValueError: in ``forward``, if no D has that width.

    References:
        Kingma and Welling 2019, section 2.5.1, arXiv 1906.02691.
    """

    def num_features(self, event_size: int) -> int:
        """A mean a dimension and a Cholesky factor."""
        return event_size * (event_size + 3) // 2

    def forward(self, features: Tensor) -> TorchDistribution:
        """Return N(mu, L L^T)."""
        width = features.shape[-1] if features.dim() else 0
        size = (math.isqrt(9 + 8 * width) - 3) // 2
        if not size or self.num_features(size) != width:
            raise ValueError(
                f"FullNormal expects features of shape (*batch, D + D (D + 1) / 2), got "
                f"{tuple(features.shape)}. Make the network before it end in num_features(D)."
            )
        features = at_least_float32(features)
        mean, log_sigma, lower = features.split([size, size, size * (size - 1) // 2], -1)
        # Every entry of U is picked from [0, 1, lower]: no write in place, which the tracking of
        # dependencies would not see.
        zero = torch.zeros_like(mean[..., :1])
        entries = torch.cat([zero, zero + 1, lower], -1)
        position = torch.eye(size, dtype=torch.long)
        rows, columns = torch.tril_indices(size, size, offset=-1)
        position[rows, columns] = torch.arange(2, 2 + len(rows))
        scale_tril = log_sigma.exp().unsqueeze(-1) * entries[..., position.to(features.device)]
        return dist.MultivariateNormal(mean, scale_tril=scale_tril)


class FlowNormal(Family):
    r"""A normalising flow around the factorised Gaussian, :math:`z = \mu + \sigma f_h(\epsilon)`.

    epsilon ~ N(0, I), f_h an invertible map that depends on the datum by the context h; features
    (mu, log sigma, h). It starts as :class:`DiagNormal`, f the identity. There is no closed form of its
    mean, nor of its KL to any prior: ELBOs take both by Monte Carlo.

    The flow works on epsilon, which is of unit size whatever mu and sigma are, and not on z.

    Args:
        dim: D, two or more.
        steps: of the flow, each moving every dimension.
        hidden: the width of the hidden layers of its networks.
        context: the width of h.

    Shape:
        features ``(*batch, 2 D + context)``; event ``(D,)``.

    Raises:
        ValueError: as :class:`CouplingFlow`; from ``num_features`` for another event size than D; in
            ``forward``, if the width is another.

    References:
        Rezende and Mohamed 2015, arXiv 1505.05770; Dinh et al. 2017, arXiv 1605.08803.
    """

    def __init__(self, dim: int, steps: int = 4, hidden: int = 64, context: int = 32) -> None:
        super().__init__()
        self.widths = [dim, dim, context]
        self.flow = CouplingFlow(dim, steps, hidden, context)

    def num_features(self, event_size: int) -> int:
        """A mean and a log sigma a dimension, and the context."""
        if event_size != self.widths[0]:
            raise ValueError(
                f"This FlowNormal is over {self.widths[0]} dimensions, asked for {event_size}: make "
                f"FlowNormal({event_size})."
            )
        return sum(self.widths)

    def forward(self, features: Tensor) -> TorchDistribution:
        """Return the distribution of mu + sigma f_h(epsilon)."""
        if features.shape[-1:] != (sum(self.widths),):
            raise ValueError(
                f"FlowNormal expects features of shape (*batch, {sum(self.widths)}), mu and log sigma of "
                f"{self.widths[0]} and a context of {self.widths[2]}, got {tuple(features.shape)}. Make the "
                "network before it end in num_features(D)."
            )
        mean, log_sigma, context = at_least_float32(features).split(self.widths, -1)
        base = dist.Normal(torch.zeros_like(mean), torch.ones_like(mean)).to_event(1)
        # The cache hands the drawn epsilon on to log_prob, which so inverts nothing.
        place = AffineTransform(mean, log_sigma.exp(), event_dim=1, cache_size=1)
        return dist.TransformedDistribution(base, [*self.flow(context), place])
