"""Evidence: log p(x) and the ELBO's terms for every data point, from traces alone.

Nothing here depends on the internals of a model. It needs a plate of the data around every site: the one
named "data", else the only one around all of them. There may be several latent sites, and the model may come
from elsewhere. A site that model and guide both observe is no part of log q. A discrete site of the model is
summed out exactly if it is marked ``infer={"enumerate": "parallel"}`` and missing in the guide. Everything
runs in eval mode and without gradients, and changes only the random state. A batch holds the arguments of
model and guide: a tensor, or a tuple. Tensors as long as the first one hold a row for each data point.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_vae.arguments import check_flag, whole_number
from pyro_vae.evaluation import weights
from pyro_vae.evaluation.checks import check_factors, check_whole
from pyro_vae.evaluation.chunks import checked_chunks
from pyro_vae.evaluation.weights import draw_weights, log_densities, log_mean, log_prob
from pyro_vae.programs import Batch, Pair, Program, as_args
from pyro_vae.programs.faults import locate
from pyro_vae.programs.plates import find_layout
from pyro_vae.programs.traces import (
    EvaluationError,
    Site,
    latent_sites,
    observed_sites,
)
from pyro_vae.table import Table, table_of_means


class LogEvidence(NamedTuple):
    """The importance-weighted bound on log p(x), for every data point.

    ``print`` and a notebook show its mean.

    Attributes:
        values: the bound in nats, (N,).
        standard_error: its Monte Carlo standard error in nats, (N,), by the delta method; NaN with
            one sample. It measures the noise, not the gap to log p(x).
    """

    values: Tensor
    standard_error: Tensor

    def mean(self) -> Tensor:
        """Return the mean over the data, in nats for each data point."""
        return self.values.mean()

    def __str__(self) -> str:
        return str(self._table())

    def _repr_html_(self) -> str:
        return self._table()._repr_html_()

    def _table(self) -> Table:
        rows: dict[str, Tensor | str] = {"log evidence, by importance weights": self.values}
        # The errors of the data are independent: each has its own samples.
        noise = float(self.standard_error.double().square().sum().sqrt()) / len(self.values)
        if not math.isnan(noise):
            rows["Monte Carlo error of the mean"] = f"{noise:.3f}"
        return table_of_means(rows, self.values)


class ELBOTerms(NamedTuple):
    """The ELBO and its two parts, for every data point. ``print`` and a notebook show their means.

    Attributes:
        elbo: E_q[log p(x, z) - log q(z | x)], reconstruction - kl, in nats, (N,).
        reconstruction: E_q[log p(x | z)], in nats, (N,).
        kl: E_q[log q(z | x) - log p(z)], in nats, (N,).
    """

    elbo: Tensor
    reconstruction: Tensor
    kl: Tensor

    def __str__(self) -> str:
        return str(self._table())

    def _repr_html_(self) -> str:
        return self._table()._repr_html_()

    def _table(self) -> Table:
        names = ("ELBO", "reconstruction, E[log p(x | z)]", "KL(q || p)")
        return table_of_means(dict(zip(names, self, strict=True)), self.elbo)


def log_evidence(
    model: Program, guide: Program, batch: Batch, num_samples: int = 1000, *, compiled: bool = False
) -> LogEvidence:
    r"""Estimate log p(x) of every data point by importance sampling from the guide.

    The estimate is :math:`\log \frac{1}{K} \sum_k p(x, z_k) / q(z_k | x)` with z_k from q. It is a lower
    bound in expectation, which rises to log p(x) with K. If the model enumerates discrete sites k that the
    guide leaves out, p(x, z) is exactly :math:`\sum_k p(x, z, k)`. Scales (a KL weight, a subsampled plate)
    are left out and masks are kept: it is the evidence of the model, for any training objective. Factors
    (``pyro.factor``) of model and guide are no densities, and are left out too.

    If model and guide can take an extra dimension on the left, samples are drawn side by side in a plate.
    Otherwise they are drawn one after the other. This is tried on every size of chunk.
    A chunk of data times samples bounds the memory. Nearly all of the time goes into the decoder's matrix
    products; ``torch.autocast`` around the call reduces their precision.

    Args:
        model: a Pyro model with all sites inside the plate of the data.
        guide: a Pyro guide with the latent sites inside the plate of the data.
        batch: the data, a tensor ``(N, ...)`` or a tuple of the model's arguments.
        num_samples: K, the number of importance samples for each data point.
        compiled: compile a chunk's weights, as :class:`~pyro_vae.CompiledELBO` compiles a step. This takes
            some seconds, which pay off for many data points and samples. A smaller last chunk runs
            uncompiled. The pair must have static structure.

    Returns:
        The bound and its standard error, in nats for each data point.

    Raises:
        ValueError: if num_samples is not positive, the batch does not fit, a site is outside
            the plate of the data or in a subsampled plate inside it, a factor may be a density, an autoguide
            holds the posteriors of other data, or a weight is not finite; with ``compiled``, if the pair
            cannot be captured.

    References:
        Burda et al. 2015, arXiv 1509.00519.
    """
    num_samples = whole_number("num_samples", num_samples, 1, "pass 1000, for example")
    check_flag("compiled", compiled)
    dtype, sums = torch.get_default_dtype(), None
    pair = Pair(model, guide, as_args(batch))
    with pair.evaluating():
        for data, blocks in draw_weights(pair, num_samples, compiled=compiled):
            # Log sum w and log sum w^2, merged block by block. They are allocated once for all data. Small
            # tensors that are made between the large ones of a block would cut memory into pieces too small
            # for the next block.
            if sums is None:
                x = pair.args[0]
                sums = x.new_full((2, len(x)), -math.inf, dtype=torch.float64)
            first, second = sums[:, data]
            for log_w in blocks:
                dtype, log_w = log_w.dtype, log_w.double()
                torch.logaddexp(first, log_w.logsumexp(0), out=first)
                torch.logaddexp(second, (2 * log_w).logsumexp(0), out=second)
    assert sums is not None
    values, error = log_mean(sums[0], sums[1], num_samples)
    return LogEvidence(values.to(dtype), error.to(dtype))


def elbo_terms(model: Program, guide: Program, batch: Batch) -> ELBOTerms:
    """Estimate the ELBO of every data point and its parts, with one sample of the guide for each.

    It is always the plain ELBO. Scales (a KL weight, a subsampled plate) and factors (``pyro.factor``) are
    left out, and masks are kept. Enumerated sites that the guide leaves out are summed out of both p(x, z)
    and p(z). The KL is by Monte Carlo. So the KL of one data point is noisy and can be negative, but not a
    mean over many.

    Args:
        model: a Pyro model with all sites inside the plate of the data.
        guide: a Pyro guide with the latent sites inside the plate of the data.
        batch: the data, a tensor ``(N, ...)`` or a tuple of the model's arguments.

    Returns:
        ELBO, reconstruction and KL, in nats for each data point.

    Raises:
        ValueError: as :func:`log_evidence`.
    """
    found: list[tuple[Tensor, ...]] = []
    pair = Pair(model, guide, as_args(batch))
    with pair.evaluating():
        layout = None
        for chunk in checked_chunks(pair, weights.rows_at_once(pair)):
            with chunk.isolated(validate=False):
                layout = layout or find_layout(chunk, particles=False)
                before = chunk.snapshot()
                traces = layout.with_enumeration(chunk).trace()
            joint, posterior = log_densities(traces, layout)
            prior = log_prob(traces.model, latent_sites(traces.model), layout)
            elbo = joint - posterior
            if not elbo.isfinite().all():
                before.restore()
                raise ValueError(locate(chunk, "The ELBO is not finite"))
            found.append((elbo, joint - prior, (posterior - prior).expand_as(elbo)))
    return ELBOTerms(*(torch.cat(parts, -1).squeeze(0) for parts in zip(*found, strict=True)))


def elbo_of_plates(model: Program, guide: Program, batch: Batch) -> tuple[float, float, float]:
    """Estimate the ELBO of all data that the plates stand for, with one sample of the guide.

    It also exists if a site is outside the plate of the data, such as a latent that all data share, or in a
    subsampled plate inside it. Sites in a subsampled plate count N / B times. Otherwise it is as in
    :func:`elbo_terms`, but sums out no enumerated sites.

    Returns:
        ELBO, reconstruction and KL, in nats.

    Raises:
        EvaluationError: if a site has to be summed out, or the numbers do not exist for another reason.
        ValueError: if the batch does not fit, or the ELBO is not finite.
    """
    pair = Pair(model, guide, as_args(batch))
    with pair.evaluating():
        check_factors(check_whole(pair)[0])
        with pair.isolated(validate=False):
            if find_layout(pair, particles=False).sums_out:
                raise EvaluationError(
                    "Enumerated sites: expected none beside sites outside the plate of the data, got some. "
                    "To fix: take the loss of TraceEnum_ELBO from svi.evaluate_loss(*batch)."
                )
            before = pair.snapshot()
            traces = pair.trace()
        latents = latent_sites(traces.model)
        kl = _total(latent_sites(traces.guide)) - _total(latents)
        reconstruction = _total(observed_sites(traces.model))
        if not math.isfinite(reconstruction - kl):
            before.restore()
            raise ValueError(locate(pair, "The ELBO is not finite"))
    return reconstruction - kl, reconstruction, kl


def _total(sites: Mapping[str, Site]) -> float:
    """Sum the masked log probabilities of sites, scaled only by their subsampled plates."""
    total = 0.0
    for site in sites.values():
        ratios = [(f.full_size or f.size) / f.size for f in site["cond_indep_stack"]]
        log_prob = scale_and_mask(site["unscaled_log_prob"].double(), mask=site["mask"])
        total += math.prod(ratios) * float(log_prob.sum())
    return total
