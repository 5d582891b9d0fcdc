"""Diagnostics: whether to trust the evidence of a data point, by the tail of its importance weights."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vae.arguments import whole_number
from pyro_vae.evaluation.weights import draw_weights
from pyro_vae.programs import Batch, Pair, Program, as_args
from pyro_vae.table import Table


class EvidenceDiagnostics(NamedTuple):
    """How far you can trust the evidence of each data point. ``print`` and a notebook show a summary.

    Attributes:
        effective_sample_size: (sum w)^2 / sum w^2, between 1 and the number of samples, (N,).
        pareto_k: k-hat, the shape of a Pareto tail fitted to the largest weights, (N,). The weights have a
            finite variance for k below 1/2. It is infinite if one draw has all the weight, and minus infinity
            if all weights are equal. It is also infinite, and says nothing, if most of the largest weights
            are equal, as may be with a discrete latent in the guide.
        num_samples: K, the number of importance samples of each data point.
    """

    effective_sample_size: Tensor
    pareto_k: Tensor
    num_samples: int

    @property
    def threshold(self) -> float:
        """The largest k-hat to trust with this number of samples, min(1 - 1 / log10 K, 0.7)."""
        return min(1 - 1 / math.log10(self.num_samples), 0.7)

    @property
    def trusted(self) -> Tensor:
        """Whether pareto_k is at most the threshold, (N,) bool."""
        return self.pareto_k <= self.threshold

    def __str__(self) -> str:
        return str(self._table())

    def _repr_html_(self) -> str:
        return self._table()._repr_html_()

    def _table(self) -> Table:
        trusted, size = self.trusted, self.effective_sample_size
        rows = [
            ("", "value"),
            (f"data points to trust, k-hat at most {self.threshold:.2f}", f"{int(trusted.sum()):,}"),
            ("median k-hat", f"{self.pareto_k.median():.2f}"),
            ("median effective sample size", f"{size.quantile(0.5):.1f}"),
            ("smallest effective sample size", f"{size.min():.1f}"),
        ]
        return Table(f"{len(size):,} data points, {self.num_samples:,} importance samples each", rows)


def evidence_diagnostics(
    model: Program, guide: Program, batch: Batch, num_samples: int = 1000
) -> EvidenceDiagnostics:
    r"""Say for every data point whether to trust the importance weights of its evidence.

    If a guide misses a part of the posterior, the bound is too low. Its standard error may still be small,
    since no draw has seen that part. Two numbers show this:

    - the effective sample size: with 10 of 1,000 draws, ten draws carry the estimate;
    - Pareto k-hat: a generalised Pareto distribution is fitted to the weights above their quantile of about
      :math:`1 - 3 / \sqrt K`. Its shape k says how heavy their tail is: moments of order 1 / k and above are
      infinite. Above 0.7, an accurate estimate needs more samples than anyone can draw.

    If k-hat is too large, use a better guide (a richer family, a longer training), or
    :func:`~pyro_vae.annealed_evidence`. A small k-hat is no proof: draws that all miss a distant mode look
    good too.

    Args:
        model: a Pyro model with all sites inside the plate of the data.
        guide: a Pyro guide with the latent sites inside the plate of the data.
        batch: the data, a tensor ``(N, ...)`` or a tuple of the model's arguments.
        num_samples: K, at least 25; the tail is the largest :math:`\min(K / 5, 3 \sqrt K)` weights.

    Returns:
        Effective sample size and k-hat of each data point.

    Raises:
        ValueError: if num_samples is below 25; else as :func:`~pyro_vae.log_evidence`.

    References:
        Vehtari et al. 2015, Pareto Smoothed Importance Sampling, arXiv 1507.02646; Zhang and Stephens 2009, A
        New and Efficient Estimation Method for the Generalized Pareto Distribution (the fit).
    """
    num_samples = whole_number("num_samples", num_samples, 25, "pass 1000: 94 of them are the tail")
    tail = int(min(num_samples / 5, 3 * math.sqrt(num_samples)))
    sizes, shapes = [], []
    pair = Pair(model, guide, as_args(batch))
    with pair.evaluating():
        for _, blocks in draw_weights(pair, num_samples):
            log_w = torch.cat(list(blocks)).double()
            sizes.append((2 * log_w.logsumexp(0) - (2 * log_w).logsumexp(0)).exp())
            # In units of the largest weight, which changes no shape.
            largest = (log_w - log_w.amax(0)).exp().topk(tail + 1, 0).values
            shapes.append(pareto_shape(largest[:-1] - largest[-1]))
    return EvidenceDiagnostics(torch.cat(sizes), torch.cat(shapes), num_samples)


def pareto_shape(excess: Tensor) -> Tensor:
    """Return the shape k of generalised Pareto distributions, fitted to draws above their threshold.

    It is the posterior mean of Zhang and Stephens under their prior. As in Vehtari et al., it is moved a
    little towards 1/2 for small tails.

    Args:
        excess: each weight minus the threshold, in units of the largest weight, the largest first,
            (M, *batch).

    Returns:
        k, (*batch): infinite if most of the excess is 0 compared with the largest, minus infinity if all
        weights are equal.
    """
    count, largest = len(excess), excess[0]
    quartile = excess[-int(count / 4 + 0.5)]
    points = 30 + int(math.sqrt(count))
    # Points of theta = -k / sigma, weighted by their profile likelihood.
    index = torch.arange(1, points + 1).to(excess).reshape(-1, *[1] * largest.dim())
    theta = 1 / largest + (1 - (points / (index - 0.5)).sqrt()) / (3 * quartile)
    k = torch.stack([torch.log1p(-each * excess).mean(0) for each in theta])
    likelihood = count * ((-theta / k).log() - k - 1)
    theta_hat = (likelihood.softmax(0) * theta).sum(0)
    shape = (count * torch.log1p(-theta_hat * excess).mean(0) + 5) / (count + 10)
    equal, alone = largest < 1e-4, quartile <= 0  # equal but for rounding
    return shape.masked_fill(alone, math.inf).masked_fill(equal, -math.inf)
