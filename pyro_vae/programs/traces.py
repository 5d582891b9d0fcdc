"""Traces: the sites of a run, and the log probability of each datum."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from pyro import poutine
from pyro.distributions import MaskedDistribution, Unit
from pyro.distributions.torch_distribution import ExpandedDistribution
from pyro.distributions.util import scale_and_mask
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import Tensor
from torch.distributions import Independent

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


def family(fn: Any) -> str:
    """Name the family of a distribution, whatever its event dimensions, expansion and mask."""
    while isinstance(fn, Independent | MaskedDistribution | ExpandedDistribution):
        fn = fn.base_dist
    name: str = getattr(fn, "family_name", type(fn).__name__.lstrip("_"))
    return name


def data_plate(name: str, site: Site) -> CondIndepStackFrame:
    """Return the plate "data" of a site.

    Raises:
        ValueError: if it stands outside, in another plate that is subsampled, or if "data" is looped over.
    """
    frames = {frame.name: frame for frame in site["cond_indep_stack"]}
    if "data" not in frames:
        raise ValueError(
            f"Site '{name}' stands outside the plate 'data' (its plates: {sorted(frames) or 'none'}),"
            " so it has no log probability of one datum. Expected every site inside "
            "pyro.plate('data', len(x))."
        )
    if frames["data"].dim is None:
        raise ValueError(
            f"The plate 'data' of site '{name}' is looped over, so the data have no dimension. Expected them "
            "side by side: with pyro.plate('data', len(x))."
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

    Sites that were enumerated are summed out exactly.

    Args:
        trace: of model or guide, with log probabilities.
        weights: of the sites to sum.
        particle_dim: the batch dimension of the particles, if they were drawn side by side.

    Returns:
        In nats, (particles, N), with 1 for particles where they have no dimension.
    """
    terms = []
    for log_prob, data_dim in _factors(trace, weights):
        # The sum over enumerated sites drops dimensions of size 1.
        log_prob = log_prob[(None,) * (-(particle_dim or cast(int, data_dim)) - log_prob.dim())]
        rest = [dim for dim in range(-log_prob.dim(), 0) if dim not in (data_dim, particle_dim)]
        if rest:
            log_prob = log_prob.sum(rest)
        terms.append(log_prob if particle_dim else log_prob.unsqueeze(0))
    return sum(terms[1:], start=terms[0]) if terms else torch.zeros(1, 1)


def _factors(trace: poutine.Trace, weights: Mapping[str, float | Tensor]) -> list[tuple[Tensor, int | None]]:
    """Return weighted, masked log probabilities and their dimensions of data; enumerated sites summed out."""
    trace = prune_subsample_sites(trace)
    sites: list[Site] = [trace.nodes[name] for name in weights]
    data_dims = [data_plate(site["name"], site).dim for site in sites]
    if not any("_enumerate_dim" in site["infer"] for site in sites):
        log_probs = [
            scale_and_mask(site["unscaled_log_prob"], scale=weights[site["name"]], mask=site["mask"])
            for site in sites
        ]
        return list(zip(log_probs, data_dims, strict=True))
    trace.pack_tensors()
    factors: OrderedDict[frozenset[str], list[Any]] = OrderedDict()
    for site in sites:
        # A masked site k still has to sum to one, so its own probabilities are never masked.
        mask = None if "_enumerate_dim" in site["infer"] else site["packed"]["mask"]
        log_prob = packed.scale_and_mask(
            site["packed"]["unscaled_log_prob"], scale=weights[site["name"]], mask=mask
        )
        plates = frozenset(
            trace.plate_to_symbol[frame.name] for frame in site["cond_indep_stack"] if frame.vectorized
        )
        factors.setdefault(plates, []).append(log_prob)
    dims = {dim for terms in factors.values() for term in terms for dim in term._pyro_dims}
    contracted = contract_tensor_tree(factors, dims - set(trace.plate_to_symbol.values()))
    return [
        (packed.unpack(term, trace.symbol_to_dim), data_dims[0])
        for terms in contracted.values()
        for term in terms
    ]
