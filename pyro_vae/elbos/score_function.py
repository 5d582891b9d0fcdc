"""Score function: the gradient of a bound of K draws that no path through a draw carries, and the bound."""

import math

import torch
from torch import Tensor


def bound(log_w: Tensor, alpha: float = 0.0) -> Tensor:
    """Return 1 / (1 - alpha) log mean w^(1 - alpha) of each datum, the mean of log w at 1: (K, N) -> (N,)."""
    if alpha == 1:
        return log_w.mean(0)
    return (((1 - alpha) * log_w).logsumexp(0) - math.log(len(log_w))) / (1 - alpha)


def gain(log_w: Tensor, alpha: float = 0.0) -> Tensor:
    """Return what each draw adds to the bound, L - L_-k: (K, N) -> (K, N).

    L_-k is L with the mean of the others for log w_k: 0 without others, or where they are all impossible.
    """
    k = torch.eye(len(log_w), dtype=torch.bool, device=log_w.device).unsqueeze(-1)
    others = torch.where(k, 0, log_w.unsqueeze(1)).sum(0) / (len(log_w) - 1)
    without = bound(torch.where(k, others, log_w.unsqueeze(1)), alpha)
    return bound(log_w, alpha) - torch.where(without.isfinite(), without, 0)


def by_score(gains: Tensor, score: Tensor) -> Tensor:
    """Return 0, with the gradient that no path carries: sum_k gain_k grad log q(z_k), of each datum."""
    return gradient_of((gains * score).sum(0))


def gradient_of(value: Tensor) -> Tensor:
    """Return 0, with the gradient of a value."""
    return value - value.detach()
