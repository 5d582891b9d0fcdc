"""Traces: the sites of a run, and the log probability of each datum."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from pyro import poutine
from pyro.distributions import Unit
from pyro.distributions.util import scale_and_mask
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.util import site_is_subsample
from torch import Tensor

Site = Any  # a node of a trace: Pyro's Message


def traces(
    model: Callable[..., Any], guide: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[poutine.Trace, poutine.Trace]:
    """Trace the guide and the model on copies of its latents, with log probabilities: (model's, guide's).

    Copies, so that a gradient that comes back through the model can be told from one through the guide.
    """
    guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
    given = guide_trace.copy()
    for name, site in latent_sites(guide_trace).items():
        given.nodes[name] = cast(Any, dict(site, value=site["value"].clone()))
    model_trace = poutine.trace(poutine.replay(model, trace=given)).get_trace(*args, **kwargs)
    guide_trace.compute_score_parts()
    model_trace.compute_log_prob()
    return model_trace, guide_trace


def is_plate(site: Site) -> bool:
    """Say whether a site is the draw of a plate: which data it holds."""
    return bool(site_is_subsample(site))


def sample_sites(trace: poutine.Trace) -> Iterator[tuple[str, Site]]:
    """Yield the sample sites of a trace, without plates and deterministic sites."""
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or is_plate(site):
            continue
        if not cast(dict[str, Any], site["infer"]).get("_deterministic"):
            yield name, site


def observed_sites(trace: poutine.Trace) -> dict[str, Site]:
    """Return the observed sites of a trace, without factors."""
    return {
        name: site
        for name, site in sample_sites(trace)
        if site["is_observed"] and not isinstance(innermost(site["fn"]), Unit)
    }


def latent_sites(trace: poutine.Trace) -> dict[str, Site]:
    """Return the sites of a trace that are sampled, not observed."""
    return {name: site for name, site in sample_sites(trace) if not site["is_observed"]}


def innermost(fn: Any) -> Any:
    """Return the distribution inside Independent, masked and expanded ones."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn


def data_plate(name: str, site: Site) -> CondIndepStackFrame:
    """Return the plate "data" of a site.

    Raises:
        ValueError: if it stands outside, or in another plate that is subsampled.
    """
    frames = {frame.name: frame for frame in site["cond_indep_stack"]}
    if "data" not in frames:
        raise ValueError(
            f"Site '{name}' stands outside the plate 'data' (its plates: {sorted(frames) or 'none'}),"
            " so it has no log probability of one datum. Expected every site inside "
            "pyro.plate('data', len(x))."
        )
    for frame in frames.values():
        if frame.name != "data" and frame.full_size not in (None, frame.size):
            raise ValueError(
                f"Site '{name}' stands in the plate '{frame.name}' that subsamples {frame.size} of "
                f"{frame.full_size}, so a datum's log probability is not all there. Expected the "
                "whole plate: subsample 'data' alone."
            )
    return frames["data"]


def per_datum(
    trace: poutine.Trace, weights: Mapping[str, float | Tensor], particle_dim: int | None = None
) -> Tensor:
    """Sum the unscaled, masked log probabilities of sites, each times its weight.

    Sites that were enumerated are summed out: the logarithm of a sum of probabilities.

    Args:
        trace: of model or guide, with log probabilities.
        weights: of the sites to sum.
        particle_dim: the batch dimension of the particles, if they were drawn side by side.

    Returns:
        In nats, (particles, N), with 1 for particles where they have no dimension.
    """
    terms = []
    summed_out = {site["infer"].get("_enumerate_dim") for site in latent_sites(trace).values()}
    for name, weight in weights.items():
        site = trace.nodes[name]
        kept = {data_plate(name, site).dim, particle_dim, *summed_out}
        log_prob = scale_and_mask(site["unscaled_log_prob"], scale=weight, mask=site["mask"])
        rest = [dim for dim in range(-log_prob.dim(), 0) if dim not in kept]
        if rest:
            log_prob = log_prob.sum(rest)
        terms.append(log_prob if particle_dim else log_prob.unsqueeze(-2))
    if not terms:
        return torch.zeros(1, 1)
    total: Tensor = sum(terms[1:], start=terms[0])
    # Enumerated dimensions are left of all others.
    return total.flatten(0, -3).logsumexp(0) if total.dim() > 2 else total
