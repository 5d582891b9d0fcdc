"""Likelihoods: features to p(x | z).

A conditional distribution is any module whose ``forward`` returns a distribution; there is no other
protocol. Put a network in front and it is a decoder, p(x | z), or an encoder, q(z | x)::

    decoder = nn.Sequential(MLP(20, 400, 784), Bernoulli())
    encoder = nn.Sequential(MLP(784, 400, 2 * 20), DiagNormal())

The last dimension of the features becomes one event dimension; all others are batch dimensions.
Pixels are floats in [0, 1] throughout: a family over K grey levels observes k / (K - 1). Outside the
support ``log_prob`` is -inf, whether or not validation is on, so that a wrong pixel can never pass
for a plausible loss. Constants are kept: every ``log_prob`` is a log density or log mass in nats.
"""

import math

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn

from pyro_vae.distributions import densities
from pyro_vae.distributions.family import LOG_SIGMA_BOUNDS, Family, between, check_bounds, fit_features


class Bernoulli(Family):
    r"""Binary pixels: :math:`p(x) = \prod_i p_i^{x_i} (1 - p_i)^{1 - x_i}`, features the logits of p.

    The negative log mass is the binary cross-entropy with logits, summed over pixels (PyTorch's
    ``binary_cross_entropy_with_logits(..., reduction="sum")``). Grey pixels are outside the
    support: binarise them, or use :class:`ContinuousBernoulli` or :class:`Categorical`.

    Shape:
        features ``(*batch, D)``; event ``(D,)``, each value 0 or 1; ``mean`` is p.

    References:
        Kingma and Welling 2013, appendix C.1, arXiv 1312.6114.
    """

    def num_features(self, event_size: int) -> int:
        """One logit a pixel."""
        return event_size

    def forward(self, features: Tensor) -> TorchDistribution:
        """Return p(x) with the features as logits."""
        logits = fit_features(features, 1, "Bernoulli")
        return densities.Bernoullis(densities.Bernoulli(logits=logits), 1)


class ContinuousBernoulli(Family):
    r"""Grey pixels in [0, 1]: the Bernoulli's formula, normalised over the whole interval.

    :math:`p(x) = C(\lambda) \lambda^x (1 - \lambda)^{1 - x}`, features the logits of lambda. It is
    what "binary cross-entropy on grey pixels" becomes once its missing constant C is put back.
    Unlike for the Bernoulli, ``mean`` is not lambda.

    The density at an always black pixel rises without end as its logit falls, so the logits bend
    smoothly to within :attr:`max_logit` of 0, where lambda is float32's nearest to 0 or 1. Below 4
    they are the features to five digits. As with a bounded sigma, quote the number reached with it.

    Shape:
        features ``(*batch, D)``; event ``(D,)``, values in [0, 1].

    References:
        Loaiza-Ganem and Cunningham 2019, arXiv 1907.06845.
    """

    max_logit = 16.0

    def num_features(self, event_size: int) -> int:
        """One logit a pixel."""
        return event_size

    def forward(self, features: Tensor) -> TorchDistribution:
        """Return p(x) with the features as logits, bent at their bound."""
        features = fit_features(features, 1, "ContinuousBernoulli")
        relative = (features / self.max_logit).clamp(-100, 100)
        logits = self.max_logit * relative / (1 + relative**8) ** (1 / 8)
        return densities.ContinuousBernoulli(logits=logits).to_event(1)


class FixedSigma(nn.Module):
    """One standard deviation for all pixels, given: features -> (mean, log sigma).

    Raises:
        ValueError: if sigma is not a positive number.
    """

    bounds = None
    features_per_dimension = 1
    log_sigma: Tensor

    def __init__(self, sigma: float) -> None:
        super().__init__()
        if not (math.isfinite(sigma) and sigma > 0):
            raise ValueError(f"sigma is a positive number, got {sigma}.")
        self.register_buffer("log_sigma", torch.tensor(math.log(sigma)))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean ``(*batch, D)`` and log sigma, a scalar."""
        return features, self.log_sigma


class LearnedSigma(nn.Module):
    """One standard deviation for all pixels, learned: features -> (mean, log sigma).

    log sigma runs between its bounds by a sigmoid, so that it cannot reach zero or infinity. With
    it the decoder's term is, at its best, D / 2 log(MSE) plus a constant (Rybkin et al. 2020, arXiv
    2006.13202): the weight between reconstruction and KL sets itself.

    Args:
        initial: sigma before training, inside the bounds.
        bounds: of log sigma.

    Raises:
        ValueError: if the bounds are not finite and in order, or do not enclose the initial value.
    """

    features_per_dimension = 1

    def __init__(self, initial: float = 0.2, bounds: tuple[float, float] = LOG_SIGMA_BOUNDS) -> None:
        super().__init__()
        self.bounds = check_bounds(bounds)
        low, high = bounds
        if not (initial > 0 and low < math.log(initial) < high):
            raise ValueError(f"The initial sigma lies between exp({low}) and exp({high}), got {initial}.")
        position = (math.log(initial) - low) / (high - low)
        self.free = nn.Parameter(torch.logit(torch.tensor(position)))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean ``(*batch, D)`` and log sigma, a scalar."""
        return features, between(self.bounds, self.free)


class PixelSigma(nn.Module):
    """A standard deviation for every pixel, from the features: features -> (mean, log sigma).

    Half of the features are the means, half the log sigmas before a sigmoid lays them between their
    bounds. On images with constant pixels the likelihood rises until log sigma meets its lower
    bound, so the number reached tells of the bound as much as of the model: quote it with the bound.

    Args:
        bounds: of log sigma.

    Raises:
        ValueError: if the bounds are not finite and in order.
    """

    features_per_dimension = 2

    def __init__(self, bounds: tuple[float, float] = LOG_SIGMA_BOUNDS) -> None:
        super().__init__()
        self.bounds = check_bounds(bounds)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and log sigma, both ``(*batch, D)``."""
        mean, free = fit_features(features, 2, "Gaussian(PixelSigma())").chunk(2, -1)
        return mean, between(self.bounds, free)


class Gaussian(Family):
    r"""Real pixels: :math:`x \sim N(\mu, \sigma^2)`, independent given the features.

    The negative log density is SSE / (2 sigma^2) + D / 2 log(2 pi sigma^2), with SSE the sum of
    squared errors. Its minimum over mu is that of the mean squared error, MSE = SSE / (N D); but
    the weight of SSE against the KL is 1 / (2 sigma^2), so "MSE + KL" is a choice of sigma.

    Args:
        sigma: a number, :class:`LearnedSigma` or :class:`PixelSigma`.

    Shape:
        features ``(*batch, D)``, or ``(*batch, 2 D)`` with a sigma per pixel; event ``(D,)``.

    Raises:
        ValueError: if sigma is not positive; in ``forward``, if the width is odd where 2 D is
            expected.

    References:
        Kingma and Welling 2013, appendix C.2, arXiv 1312.6114.
    """

    def __init__(self, sigma: float | LearnedSigma | PixelSigma = 1.0) -> None:
        super().__init__()
        self.sigma = sigma if isinstance(sigma, nn.Module) else FixedSigma(sigma)

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The bounds on log sigma, None where sigma is fixed."""
        return self.sigma.bounds

    def num_features(self, event_size: int) -> int:
        """A mean a pixel, and with PixelSigma a log sigma."""
        return event_size * self.sigma.features_per_dimension

    def forward(self, features: Tensor) -> TorchDistribution:
        """Return N(mean, sigma^2) over the last dimension."""
        features = fit_features(features, 1, "Gaussian")
        mean, log_sigma = self.sigma(features)
        return dist.Normal(mean, log_sigma.exp()).to_event(1)


class Categorical(Family):
    r"""K grey levels: a softmax over the levels at every pixel, observed as k / (K - 1).

    The negative log mass is the softmax cross-entropy :math:`-\sum_k t_k \log q_k`, which for a
    one-hot target t is minus the log of the target's q, summed over pixels. ``mean`` is
    :math:`\sum_k q_k k / (K - 1)`, in [0, 1].

    Args:
        levels: K, two or more.

    Shape:
        features ``(*batch, D * K)``, the K logits of a pixel together; event ``(D,)``, each value
        on the grid k / (K - 1).

    Raises:
        ValueError: if K is not a whole number of at least 2; in ``forward``, if the width is no
            multiple of K.

    References:
        van den Oord et al. 2016, arXiv 1601.06759 (softmax over pixel values).
    """

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.levels = _check_levels(levels)

    def num_features(self, event_size: int) -> int:
        """K logits a pixel."""
        return event_size * self.levels

    def forward(self, features: Tensor) -> TorchDistribution:
        """Return the softmax over levels at every pixel."""
        features = fit_features(features, self.levels, f"Categorical({self.levels})")
        logits = features.unflatten(-1, (-1, self.levels))
        return densities.GreyCategorical(logits).to_event(1)


def _check_levels(levels: int) -> int:
    if not isinstance(levels, int) or levels < 2:
        raise ValueError(f"The number of grey levels is a whole number of at least 2, got {levels}.")
    return levels


class DiscretizedLogistic(Family):
    r"""K grey levels in order: a logistic density, integrated over each level's bin.

    :math:`P(x) = s((x + h - \mu) / \sigma) - s((x - h - \mu) / \sigma)` with s the logistic
    function and 2 h = 1 / (K - 1) the width of a bin; the end bins take the tails. It is a log
    *mass*: comparable with :class:`Categorical` over as many levels.

    Args:
        levels: K, 256 for 8-bit pixels.
        bounds: of log sigma, the logistic's log scale.

    Shape:
        features ``(*batch, 2 D)``, locations and log scales before their bounds; event ``(D,)``,
        each value on the grid k / (K - 1).

    Raises:
        ValueError: if K is not a whole number of at least 2 or the bounds are not finite and in
            order; in ``forward``, if the width is odd.

    References:
        Kingma et al. 2016, arXiv 1606.04934; Salimans et al. 2017, arXiv 1701.05517.
    """

    def __init__(self, levels: int = 256, bounds: tuple[float, float] = LOG_SIGMA_BOUNDS) -> None:
        super().__init__()
        self.levels = _check_levels(levels)
        self.bounds = check_bounds(bounds)

    def num_features(self, event_size: int) -> int:
        """A location and a log scale a pixel."""
        return 2 * event_size

    def forward(self, features: Tensor) -> TorchDistribution:
        """Return the discretised logistic at every pixel."""
        loc, free = fit_features(features, 2, "DiscretizedLogistic").chunk(2, -1)
        return densities.DiscretizedLogistic(loc, between(self.bounds, free), self.levels).to_event(1)
