"""Missing entries: their possible values, and how well the observed entries predict each other.

A NaN in the batch is a missing entry. Let x = (x_o, x_m), observed and missing, and z_k ~ q(z | x_o). The
weights w_k = p(x_o, z_k) / q(z_k | x_o) are enough. They average to p(x_o). A z_k that is drawn again by its
weight is a draw of p(z | x_o).
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.infer import infer_discrete
from torch import Tensor

from pyro_vae.arguments import check_tensor, given, require, whole_number
from pyro_vae.evaluation.evidence import LogEvidence, log_evidence
from pyro_vae.evaluation.weights import draw_weights, log_densities
from pyro_vae.programs import Batch, Pair, Program, as_args, mask_missing
from pyro_vae.programs.missing import missing_entries
from pyro_vae.programs.observations import is_product
from pyro_vae.programs.plates import PlateLayout
from pyro_vae.programs.traces import Site, data_plate, family, latent_sites, observed_sites


class Imputation(NamedTuple):
    """An observed site whose missing entries are filled in. The observed entries do not change.

    Attributes:
        mean: filled with E[x_m | x_o], (N, ...); NaN where p(x | z) has no mean.
        draw: filled with one draw of p(x_m | x_o), jointly for all entries of a data point, (N, ...).
    """

    mean: Tensor
    draw: Tensor


def impute(model: Program, guide: Program, batch: Batch, num_samples: int = 1000) -> dict[str, Imputation]:
    r"""Fill in the missing entries of a batch, which NaN marks, given the observed ones.

    With z_k from the guide and its weight :math:`w_k = p(x_o, z_k) / q(z_k | x_o)`, the mean is
    :math:`\sum_k w_k E[x_m | z_k] / \sum_k w_k`. The draw takes one z_k with a probability proportional to
    w_k, and x_m from :math:`p(x_m | z_k)`. Both are exact in the limit of many samples. With few samples,
    they are biased towards the guide. Every call makes new draws.

    A chunk of data times samples, and the result, bound the memory.

    Args:
        model: any model whose observed sites are products over their entries, given z.
        guide: its guide. Neither is wrapped: :func:`~pyro_vae.mask_missing` is applied here.
        batch: the data, a tensor ``(N, ...)`` or a tuple of the model's arguments.
        num_samples: K, the number of importance samples for each data point.

    Returns:
        Observed site -> its two completions, each (N, ...), the data first.

    Raises:
        ValueError: as :func:`~pyro_vae.log_evidence` and :func:`~pyro_vae.mask_missing`; if a site with
            missing entries is not a product over its entries.

    References:
        Mattei and Frellsen 2019, arXiv 1812.02633; Rubin 1988 (sampling importance resampling).
    """
    num_samples = whole_number("num_samples", num_samples, 1, "pass 1000, for example")
    pair = Pair(*mask_missing(model, guide), as_args(batch))
    with pair.evaluating():
        parts = [_completed(blocks) for _, blocks in draw_weights(pair, num_samples, _complete)]
    return {
        name: Imputation(*map(torch.cat, zip(*(part[name] for part in parts), strict=True)))
        for name in parts[0]
    }


def conditional_evidence(
    model: Program,
    guide: Program,
    batch: Batch,
    given: Tensor,
    num_samples: int = 1000,
    *,
    compiled: bool = False,
) -> LogEvidence:
    r"""Estimate log p(x_A | x_B) of every data point: how well some entries predict the others.

    It is :math:`\log p(x_A, x_B) - \log p(x_B)`, each by :func:`~pyro_vae.log_evidence` with separate draws.
    Each is a lower bound in expectation. Their difference is no bound. It is too low if the guide fits x_B
    alone better than all of x, and too high in the other case. It tends to the exact value with the number of
    samples.

    Args:
        model: any model, as for :func:`impute`.
        guide: its guide. Neither is wrapped.
        batch: the data, a tensor ``(N, ...)`` or a tuple of the model's arguments.
        given: a bool tensor like the first tensor of the batch, True at the entries of B. A is the others.
            An entry that is NaN in the batch is missing, and belongs to neither.
        num_samples: the number of importance samples of each data point, for each of the two.
        compiled: as for :func:`~pyro_vae.log_evidence`.

    Returns:
        log p(x_A | x_B) and its standard error, from those of both parts, in nats for each data point.

    Raises:
        ValueError: as :func:`~pyro_vae.log_evidence` and :func:`~pyro_vae.mask_missing`; if ``given`` is no
            bool tensor of the shape of x.
    """
    args = as_args(batch)
    x = args[0] if args else None
    check_tensor("batch", x)
    assert isinstance(x, Tensor)
    require(x.is_floating_point(), "batch", "floats, for NaN to mark some", x.dtype, "x.float()")
    _check_entries(given, x)
    pair = mask_missing(model, guide)
    part = (x.masked_fill(~given, math.nan), *args[1:])
    whole, of_given = (log_evidence(*pair, each, num_samples, compiled=compiled) for each in (args, part))
    error = torch.hypot(whole.standard_error, of_given.standard_error)
    return LogEvidence(whole.values - of_given.values, error)


def _completed(blocks: Iterable[tuple[Tensor, dict[str, "_Completion"]]]) -> dict[str, Imputation]:
    """Weight the completions of some data, block of draws after block of draws."""
    total = highest = torch.tensor(-math.inf, dtype=torch.float64)
    means: dict[str, Tensor] = {}
    draws: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    for log_w, sites in blocks:
        log_w = log_w.double()
        of_block = log_w.logsumexp(0)
        total = torch.logaddexp(total, of_block)
        # A block may have no weight at all: -inf minus -inf is NaN, and does not count.
        share = (of_block - total).exp().nan_to_num()  # of the block in the sum of all weights so far
        weight = (log_w - of_block).exp().nan_to_num()  # of a draw in its block
        # Where log w plus Gumbel noise is largest is a draw by weight, also from block to block.
        height, chosen = (log_w - torch.empty_like(log_w).exponential_().log()).max(0)
        higher, highest = height > highest, torch.maximum(height, highest)
        for name, (value, mean, draw) in sites.items():
            entries = (1,) * (value.dim() - 2)
            block_mean = (weight.reshape(*weight.shape, *entries) * mean).sum(0)
            drawn = draw[chosen, torch.arange(draw.shape[1], device=draw.device)]
            before = means.get(name, block_mean)
            means[name] = before + share.reshape(-1, *entries) * (block_mean - before)
            draws[name] = torch.where(higher.reshape(-1, *entries), drawn, draws.get(name, drawn))
            values[name] = value[0]
    return {
        name: Imputation(*(torch.where(value.isnan(), guess.to(value.dtype), value) for guess in guesses))
        for name, value in values.items()
        for guesses in [(means[name], draws[name])]
    }


def _check_entries(entries: Any, x: Tensor) -> None:
    expected = f"a bool tensor of shape {tuple(x.shape)}, as the batch"
    is_mask = isinstance(entries, Tensor) and entries.dtype == torch.bool and not entries.is_meta
    got = f"a tensor of {entries.dtype}" if isinstance(entries, Tensor) and not is_mask else given(entries)
    fits = is_mask and entries.shape == x.shape
    require(fits, "given", expected, got, "pass a mask such as torch.arange(D).expand_as(x) < D // 2")


class _Completion(NamedTuple):
    """An observed site under many draws of z, each (samples, N, ...)."""

    value: Tensor  # NaN where it is missing
    mean: Tensor
    draw: Tensor


def _complete(pair: Pair, layout: PlateLayout, particles: int) -> tuple[Tensor, dict[str, _Completion]]:
    """Return log p(x_o, z) - log q(z | x_o), (samples, N), and the observed sites given each z."""
    with pair.isolated(validate=False):
        side_by_side = layout.with_particles(pair, particles)
        traces = layout.with_enumeration(side_by_side).trace()
        p, q = log_densities(traces, layout)
        model_trace = traces.model
        names = observed_sites(model_trace).keys()
        if layout.sums_out:  # k ~ p(k | x_o, z)
            z = {name: site["value"] for name, site in latent_sites(traces.guide).items()}
            drawn = infer_discrete(
                poutine.condition(side_by_side.model, data=z), -2 - layout.max_plate_nesting
            )
            model_trace = pair.wrapped(model=drawn).trace_model()
        sites = {name: model_trace.nodes[name] for name in names}
        samples = len(p) if layout.particle_dim else 1
        return p - q, {name: _completion(name, site, layout, samples) for name, site in sites.items()}


def _completion(name: str, site: Site, layout: PlateLayout, samples: int) -> _Completion:
    fn, value, missing = site["fn"], site["value"], missing_entries(site)
    if missing is None:
        if value.is_floating_point() and value.isnan().any():
            require(
                is_product(fn),
                f"Site '{name}' of the model, {family(fn)}",
                "a product over entries, given z, so that missing ones can be drawn by themselves",
                "one that is joint over them",
                "observe dist.Normal(...).to_event(1), for example",
            )
        parts = value, value, value
        shape = value.shape
    else:
        parts = torch.where(missing, math.nan, value), _mean(fn), fn.sample()
        shape = missing.shape
    of_data = data_plate(name, site, layout.data).dim
    assert of_data is not None
    rows = [_per_sample(part, samples, shape).movedim(of_data - fn.event_dim, 1) for part in parts]
    return _Completion(*rows)


def _per_sample(part: Tensor, samples: int, shape: torch.Size) -> Tensor:
    """Return a part of a site, with or without a dimension of samples, as (samples, *shape)."""
    return part.reshape(-1, *shape).expand(samples, *shape)


def _mean(fn: Any) -> Tensor:
    try:
        mean: Tensor = fn.mean
    except NotImplementedError:
        return torch.full_like(fn.sample(), math.nan)
    return mean.expand(fn.shape())
