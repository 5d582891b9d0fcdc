"""Likelihoods: families for p(x | z), the distribution of an image given its latent.

Pixels are floats in [0, 1]. A family over K grey levels observes them as k / (K - 1). Outside the support
of a mass or of a density on [0, 1], ``log_prob`` is -inf. With Pyro's validation on, it is a ValueError. So a
wrong pixel never gives a plausible loss.
"""

import math

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn

from pyro_vae.arguments import given, is_finite, require, whole_number
from pyro_vae.distributions import densities
from pyro_vae.distributions.family import (
    LOG_SIGMA_BOUNDS,
    Family,
    check_bounds,
    check_features,
    sigmoid_between,
)


class Bernoulli(Family):
    r"""Binary pixels: :math:`p(x) = \prod_i p_i^{x_i} (1 - p_i)^{1 - x_i}`, the features are the logits of p.

    The negative log mass is the binary cross-entropy with logits, summed over pixels (PyTorch's
    ``binary_cross_entropy_with_logits(..., reduction="sum")``). Grey pixels are outside the
    support. Binarise them, or use :class:`ContinuousBernoulli` or :class:`Categorical`.

    Shape:
        features ``(*batch, D)``; event ``(D,)``, each value 0 or 1; ``mean`` is p.

    Raises:
        ValueError: in ``forward``, if there are no features.

    References:
        Kingma and Welling 2013, appendix C.1, arXiv 1312.6114.
    """

    def num_features(self, event_size: int) -> int:
        """Return D: one logit per pixel."""
        return event_size

    def forward(self, features: Tensor) -> TorchDistribution:
        """Return p(x) with the features as logits."""
        logits = check_features(features, 1, "Bernoulli")
        return densities.IndependentBernoulli(densities.BernoulliDistribution(logits=logits), 1)


class ContinuousBernoulli(Family):
    r"""Grey pixels in [0, 1]: the formula of the Bernoulli, normalised over the whole interval.

    :math:`p(x) = C(\lambda) \lambda^x (1 - \lambda)^{1 - x}`; the features are the logits of lambda. This is
    "binary cross-entropy on grey pixels" with its missing constant C. Unlike for the Bernoulli, ``mean`` is
    not lambda.

    At a pixel that is always black, the density grows without limit as the logit falls. So the logits are
    bent smoothly to stay within :attr:`max_logit` of 0, where lambda is the float32 number nearest to 0 or 1.
    Logits between -4 and 4 equal the features to five digits. As with a bounded sigma, quote the bound beside
    your number.

    Shape:
        features ``(*batch, D)``; event ``(D,)``, values in [0, 1].

    Raises:
        ValueError: in ``forward``, if there are no features.

    References:
        Loaiza-Ganem and Cunningham 2019, arXiv 1907.06845.
    """

    max_logit = 16.0

    def num_features(self, event_size: int) -> int:
        """Return D: one logit per pixel."""
        return event_size

    def forward(self, features: Tensor) -> TorchDistribution:
        """Return p(x) with the features as logits, bent to stay within their bound."""
        features = check_features(features, 1, "ContinuousBernoulli")
        relative = (features / self.max_logit).clamp(-100, 100)
        logits = self.max_logit * relative / (1 + relative**8) ** (1 / 8)
        return densities.ContinuousBernoulliDistribution(logits=logits).to_event(1)


class FixedSigma(nn.Module):
    """One given standard deviation for all pixels: features -> (mean, log sigma).

    Args:
        sigma: the standard deviation.

    Raises:
        ValueError: if sigma is not a positive number.
    """

    bounds = None
    features_per_dimension = 1
    log_sigma: Tensor

    def __init__(self, sigma: float) -> None:
        super().__init__()
        positive = is_finite(sigma) and sigma > 0
        to_fix = "write Gaussian(0.1), or Gaussian(LearnedSigma()) with an object of the class"
        require(positive, "sigma", "a positive number", given(sigma), to_fix)
        self.register_buffer("log_sigma", torch.tensor(math.log(sigma)))

    def extra_repr(self) -> str:
        """Return sigma."""
        return f"{self.log_sigma.exp():.4g}"

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean ``(*batch, D)`` and log sigma, a scalar."""
        return features, self.log_sigma


class LearnedSigma(nn.Module):
    """One learned standard deviation for all pixels: features -> (mean, log sigma).

    A sigmoid keeps log sigma between its bounds, so sigma cannot reach zero or infinity. At the best sigma
    the negative log density is D / 2 log(MSE) plus a constant: the weight between reconstruction and KL is
    learned.

    Args:
        initial: sigma before training, inside the bounds.
        bounds: the bounds on log sigma.

    Raises:
        ValueError: if the bounds are not finite or not in order, or do not enclose the initial value.

    References:
        Rybkin et al. 2020, arXiv 2006.13202.
    """

    features_per_dimension = 1

    def __init__(self, initial: float = 0.2, bounds: tuple[float, float] = LOG_SIGMA_BOUNDS) -> None:
        super().__init__()
        self.bounds = check_bounds(bounds)
        low, high = self.bounds
        inside = is_finite(initial) and initial > 0 and low < math.log(initial) < high
        expected, to_fix = f"a sigma between exp({low}) and exp({high})", "choose one inside, or other bounds"
        require(inside, "initial", expected, given(initial), to_fix)
        position = (math.log(initial) - low) / (high - low)
        self.free = nn.Parameter(torch.logit(torch.tensor(position)))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean ``(*batch, D)`` and log sigma, a scalar."""
        return features, sigmoid_between(self.bounds, self.free)


class PixelSigma(nn.Module):
    """A standard deviation for every pixel, read from the features: features -> (mean, log sigma).

    The first half of the features are the means. A sigmoid maps the second half to the log sigmas, between
    their bounds. On images with constant pixels the likelihood grows until log sigma reaches its lower bound.
    Then your number depends on the bound as much as on the model: quote the bound beside it.

    Args:
        bounds: the bounds on log sigma.

    Raises:
        ValueError: if the bounds are not finite or not in order; in ``forward``, if the width is odd.
    """

    features_per_dimension = 2

    def __init__(self, bounds: tuple[float, float] = LOG_SIGMA_BOUNDS) -> None:
        super().__init__()
        self.bounds = check_bounds(bounds)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and log sigma, both ``(*batch, D)``."""
        mean, unbounded = check_features(features, 2, "Gaussian(PixelSigma())").chunk(2, -1)
        return mean, sigmoid_between(self.bounds, unbounded)


class Gaussian(Family):
    r"""Real pixels: :math:`x \sim N(\mu, \sigma^2)`, independent given the features.

    The negative log density is SSE / (2 sigma^2) + D / 2 log(2 pi sigma^2), where SSE is the sum of squared
    errors. The mu that minimises it also minimises the mean squared error, MSE = SSE / (N D). But the weight
    of the SSE against the KL is 1 / (2 sigma^2), so "MSE + KL" is a choice of sigma.

    Args:
        sigma: a number, :class:`LearnedSigma` or :class:`PixelSigma`.

    Shape:
        features ``(*batch, D)``, or ``(*batch, 2 D)`` with a sigma per pixel; event ``(D,)``.

    Raises:
        ValueError: if sigma is not positive; in ``forward``, if there are no features, or the width is
            odd where 2 D is expected.

    References:
        Kingma and Welling 2013, appendix C.2, arXiv 1312.6114.
    """

    def __init__(self, sigma: float | LearnedSigma | PixelSigma = 1.0) -> None:
        super().__init__()
        self.sigma = sigma if isinstance(sigma, nn.Module) else FixedSigma(sigma)

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The bounds on log sigma, or None if sigma is fixed."""
        return self.sigma.bounds

    def num_features(self, event_size: int) -> int:
        """Return D, one mean per pixel, or 2 D with PixelSigma, which adds a log sigma."""
        return event_size * self.sigma.features_per_dimension

    def forward(self, features: Tensor) -> TorchDistribution:
        """Return N(mean, sigma^2) over the last dimension."""
        features = check_features(features, 1, "Gaussian")
        mean, log_sigma = self.sigma(features)
        return dist.Normal(mean, log_sigma.exp()).to_event(1)


class Categorical(Family):
    r"""K grey levels: a softmax over the levels at every pixel, observed as k / (K - 1).

    The negative log mass is the softmax cross-entropy :math:`-\sum_k t_k \log q_k`, summed over pixels. For
    a one-hot target t it is -log q of the target level. ``mean`` is :math:`\sum_k q_k k / (K - 1)`, which
    lies in [0, 1].

    Args:
        levels: K, two or more.

    Shape:
        features ``(*batch, D * K)``, the K logits of each pixel side by side; event ``(D,)``, each value
        on the grid k / (K - 1).

    Raises:
        ValueError: if K is not a whole number of at least 2; in ``forward``, if the width is not a
            positive multiple of K.

    References:
        van den Oord et al. 2016, arXiv 1601.06759 (softmax over pixel values).
    """

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.levels = whole_number("levels", levels, 2, "write 256 for 8-bit pixels")

    def num_features(self, event_size: int) -> int:
        """Return D * K: K logits per pixel."""
        return event_size * self.levels

    def forward(self, features: Tensor) -> TorchDistribution:
        """Return a softmax over the levels for every pixel."""
        features = check_features(features, self.levels, f"Categorical({self.levels})")
        logits = features.unflatten(-1, (features.shape[-1] // self.levels, self.levels))
        return densities.CategoricalOnGrid(logits).to_event(1)


class DiscretizedLogistic(Family):
    r"""K ordered grey levels: a logistic density, integrated over the bin of each level.

    :math:`P(x) = s((x + h - \mu) / \sigma) - s((x - h - \mu) / \sigma)`, where s is the logistic function
    and 2 h = 1 / (K - 1) the width of a bin. The first and the last bin contain the tails. ``log_prob`` is a
    log *mass*, so it is comparable with that of :class:`Categorical` over the same number of levels.

    Args:
        levels: K, 256 for 8-bit pixels.
        bounds: the bounds on log sigma, the log scale of the logistic.

    Shape:
        features ``(*batch, 2 D)``, first the locations, then numbers that a sigmoid maps to the log scales,
        between their bounds; event ``(D,)``, each value on the grid k / (K - 1).

    Raises:
        ValueError: if K is not a whole number of at least 2, or the bounds are not finite or not in
            order; in ``forward``, if the width is odd.

    References:
        Kingma et al. 2016, arXiv 1606.04934; Salimans et al. 2017, arXiv 1701.05517.
    """

    def __init__(self, levels: int = 256, bounds: tuple[float, float] = LOG_SIGMA_BOUNDS) -> None:
        super().__init__()
        self.levels = whole_number("levels", levels, 2, "write 256 for 8-bit pixels")
        self.bounds = check_bounds(bounds)

    def num_features(self, event_size: int) -> int:
        """Return 2 D: a location and a log scale per pixel."""
        return 2 * event_size

    def forward(self, features: Tensor) -> TorchDistribution:
        """Return a discretised logistic for every pixel."""
        loc, unbounded = check_features(features, 2, "DiscretizedLogistic").chunk(2, -1)
        log_scale = sigmoid_between(self.bounds, unbounded)
        return densities.DiscretizedLogisticDistribution(loc, log_scale, self.levels).to_event(1)
