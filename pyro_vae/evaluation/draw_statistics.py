"""Statistics of many draws of a loss and its gradient: mean, variance, bias, signal-to-noise ratio."""

import math
import statistics
from typing import Any

import torch
from torch import Tensor


class RunningMoments:
    """Mean and variance of numbers or vectors that are added one at a time, in float64 (Welford 1962)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros((), dtype=torch.float64)
        self._squares = torch.zeros((), dtype=torch.float64)  # sum of (x - mean)^2

    def add(self, x: Tensor) -> None:
        """Add one number or vector."""
        self.count += 1
        delta = x - self.mean
        self.mean = self.mean + delta / self.count
        self._squares = self._squares + delta * (x - self.mean)

    @property
    def variance(self) -> Tensor:
        """The unbiased sample variance."""
        return self._squares / (self.count - 1)


class Draws:
    """Draws of one loss: its value in nats, summed over the data; its flat gradient; the seconds it took."""

    def __init__(self) -> None:
        self.loss, self.gradient = RunningMoments(), RunningMoments()
        self.seconds: list[float] = []

    def add(self, loss: float, gradient: Tensor, seconds: float) -> None:
        """Add one draw."""
        self.loss.add(torch.tensor(loss, dtype=torch.float64))
        self.gradient.add(gradient)
        self.seconds.append(seconds)


def value_statistics(
    draws: Draws, target: Draws | None, num_data: int, evidence: float | None
) -> dict[str, Any]:
    """Return the fields of a record about the value of an estimator, in nats per data point."""
    value = -draws.loss.mean.item() / num_data
    sd = draws.loss.variance.sqrt().item() / num_data
    error = sd / math.sqrt(draws.loss.count)
    bias = bias_error = None
    if target:
        bias = value + target.loss.mean.item() / num_data  # value - (-loss of the target)
        bias_error = math.hypot(error, (target.loss.variance / target.loss.count).sqrt().item() / num_data)
    return {
        "value": value,
        "value_error": error,
        "value_sd": sd,
        "gap": None if evidence is None else evidence - value,
        "gap_error": None if evidence is None else error,
        "bias": bias,
        "bias_error": bias_error,
        "ms": 1000 * statistics.median(draws.seconds),
    }


def gradient_statistics(
    draws: Draws, target: Draws | None, num_data: int, indices: Tensor, rounding: Tensor
) -> dict[str, Any]:
    """Return the fields of a record about the gradient of one group.

    Args:
        draws: of the estimator.
        target: draws of the loss that the estimator should have on average, or None.
        num_data: the number of data points in the loss.
        indices: the group's indices in the flat gradient.
        rounding: for each entry of the flat gradient, the relative size of its rounding error.
    """
    mean, variance = draws.gradient.mean[indices], draws.gradient.variance[indices]
    snr = _signal_to_noise(mean, variance.sqrt(), rounding[indices])
    bias = bias_error = None
    if target:
        target_mean, target_variance = target.gradient.mean[indices], target.gradient.variance[indices]
        norm = target_mean.norm().item()
        if norm > 10 * rounding.max().item() * target.gradient.mean.norm().item():  # not 0 but for rounding
            bias = (mean - target_mean).norm().item() / norm
            noise = variance / draws.gradient.count + target_variance / target.gradient.count
            bias_error = noise.sum().sqrt().item() / norm
    return {
        "gradient_variance": variance.sum().item() / num_data**2,
        "snr": snr,
        "snr_per_root_second": None if snr is None else snr / math.sqrt(statistics.median(draws.seconds)),
        "gradient_bias": bias,
        "gradient_bias_error": bias_error,
    }


def _signal_to_noise(mean: Tensor, sd: Tensor, rounding: Tensor) -> float | None:
    """Return the mean of abs(E g) / sd g over the entries with noise; infinity or None if there are none."""
    noisy = sd > rounding * mean.abs()
    if noisy.any():
        return (mean[noisy].abs() / sd[noisy]).mean().item()
    return math.inf if mean.any() else None
