"""The statistics of draws in a record of a comparison: mean, variance, bias, signal-to-noise ratio."""

import math
import statistics
from typing import Any

from torch import Tensor

from pyro_vae.estimators.draws import Draws


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
        draws: the draws of the estimator.
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
