"""The importance-weighted bound of K draws, and the part of its gradient that needs the score function.

If a draw is not reparametrised, no gradient flows through it to the guide's parameters. The score function,
grad log q(z), gives this part of the gradient (VIMCO: Mnih and Rezende 2016, arXiv 1602.06725).

In all shapes K is the number of draws and N the number of data points.
"""

import math

import torch
from torch import Tensor


def bound(log_w: Tensor, alpha: float = 0.0) -> Tensor:
    """Return the bound L of each data point in nats: (K, N) -> (N,).

    L = 1 / (1 - alpha) log mean_k w_k^(1 - alpha). For alpha = 1 it is the limit, mean_k log w_k.
    """
    if alpha == 1:
        return log_w.mean(0)
    return (((1 - alpha) * log_w).logsumexp(0) - math.log(len(log_w))) / (1 - alpha)


def gain(log_w: Tensor, alpha: float = 0.0) -> Tensor:
    """Return what each draw adds to the bound, L - L_-k, in nats: (K, N) -> (K, N).

    L_-k is the bound with log w_k replaced by the mean of the other log weights. It is taken as 0 if there
    are no other draws, or if they all have probability zero.
    """
    k = torch.eye(len(log_w), dtype=torch.bool, device=log_w.device).unsqueeze(-1)
    others = torch.where(k, 0, log_w.unsqueeze(1)).sum(0) / (len(log_w) - 1)
    without = bound(torch.where(k, others, log_w.unsqueeze(1)), alpha)
    return bound(log_w, alpha) - torch.where(without.isfinite(), without, 0)


def by_score(gains: Tensor, score: Tensor) -> Tensor:
    """Return zeros whose gradient is sum_k gain_k grad log q(z_k) for each data point: (K, N) -> (N,).

    Args:
        gains: the factor of each score, what the draw adds to the objective; it has no gradient.
        score: log q(z_k) of the sites that are not reparametrised.
    """
    return gradient_of((gains * score).sum(0))


def gradient_of(value: Tensor) -> Tensor:
    """Return zeros that have the gradient of ``value``: adding them changes the gradient, not the number."""
    return value - value.detach()
