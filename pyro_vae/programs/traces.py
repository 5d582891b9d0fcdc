"""Traces: the sites of a run, whether model and guide match, and the log probability of each data point."""

from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any, NoReturn, cast

import torch
from pyro import poutine
from pyro.distributions import Delta, MaskedDistribution, Unit
from pyro.distributions.torch_distribution import ExpandedDistribution
from pyro.distributions.util import is_identically_zero, scale_and_mask
from pyro.infer.util import is_validation_enabled
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import Tensor
from torch.distributions import Independent

from pyro_vae.programs.masks import masked_alike, same

Site = Any  # a node of a trace: Pyro's Message


class EvaluationError(ValueError):
    """Raised if a pair may be trained, but the requested number does not exist."""


def is_plate(site: Site) -> bool:
    """Return whether a site is the draw of a plate, which says which data it holds."""
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
    return {name: site for name, site in density_sites(trace).items() if site["is_observed"]}


def density_sites(trace: poutine.Trace) -> dict[str, Site]:
    """Return the sites of a trace that have a density: all except factors."""
    return {name: site for name, site in sample_sites(trace) if not isinstance(innermost(site["fn"]), Unit)}


def latent_sites(trace: poutine.Trace) -> dict[str, Site]:
    """Return the sites of a trace that are sampled, not observed."""
    return {name: site for name, site in sample_sites(trace) if not site["is_observed"]}


def twins(draw: Tensor) -> dict[str, Tensor]:
    """Return the tensors that a draw carries, by name: a straight-through sample, its unquantised twin."""
    return {name: twin for name, twin in vars(draw).items() if isinstance(twin, Tensor)}


def map_draw(change: Callable[[Tensor], Tensor], draw: Tensor) -> Tensor:
    """Return a changed draw that carries its changed twins: the density is taken at them."""
    changed = change(draw)
    for name, twin in twins(draw).items():
        setattr(changed, name, change(twin))
    return changed


def innermost(fn: Any) -> Any:
    """Return the distribution inside independent, masked and expanded ones."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn


def family(fn: Any) -> str:
    """Return the name of a distribution's family, for any event dimensions, expansion and mask."""
    while isinstance(fn, Independent | MaskedDistribution | ExpandedDistribution):
        fn = fn.base_dist
    name: str = getattr(fn, "family_name", type(fn).__name__.lstrip("_"))
    return name


def check_roles(
    model_trace: poutine.Trace, guide_trace: poutine.Trace, *, user: str, observes_guide: bool
) -> None:
    """Refuse a pair in which the model observes nothing, or the guide observes.

    A factor of the model counts as an observation. A factor of the guide does not.

    Args:
        model_trace: the trace of the model, on the draws of the guide.
        guide_trace: the trace of the guide.
        user: what needs the sites: the name of an ELBO, or of a function.
        observes_guide: whether the guide may observe sites that the model observes too.

    Raises:
        ValueError: naming the site.
    """
    in_model, in_guide = observed_sites(model_trace), observed_sites(guide_trace)
    only_guide = in_guide.keys() - in_model.keys()
    if only_guide:
        raise ValueError(
            f"The guide: expected it to draw latents, got one that observes {_names(only_guide)}, which the "
            "model does not observe: are model and guide swapped? To fix: pass the model first, and observe "
            "in the model."
        )
    if not any(site["is_observed"] for _, site in sample_sites(model_trace)):
        refuse_unobserved(model_trace)
    if in_guide and not observes_guide:
        raise ValueError(
            f"The guide: expected it to draw latents, got one that observes {_names(in_guide)}, as the model "
            f"does, and {user} would count it as log q. To fix: leave obs= to the model; or, where it trains "
            "a predictor of the guide, use an ELBO with rules for it, such as TraceCausalEffect_ELBO of "
            "pyro.contrib.cevae."
        )


def refuse_unobserved(model_trace: poutine.Trace) -> NoReturn:
    """Refuse a model that observes nothing.

    Raises:
        ValueError: naming its sites.
    """
    found = _names(name for name, _ in sample_sites(model_trace))
    raise ValueError(
        f"The model: expected a site with obs=, got {f'{found} without one' if found else 'no site'}: was "
        "obs= forgotten, or are model and guide swapped? To fix: write pyro.sample('x', ..., obs=x) in the "
        "model, and pass the model first."
    )


def _names(sites: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in sorted(sites))


def check_latents(
    model_trace: poutine.Trace, guide_trace: poutine.Trace, *, user: str, sums_out: bool
) -> None:
    """Refuse a pair whose latent sites differ: by name, shape, scale or mask, or a mass against a density.

    A site of the guide may be auxiliary (``infer={"is_auxiliary": True}``). A site of the model that asks to
    be enumerated may be missing in the guide if it is summed out.

    Args:
        model_trace: the trace of the model, on the draws of the guide.
        guide_trace: the trace of the guide.
        user: what needs the sites: the name of an ELBO, or of a function.
        sums_out: whether it sums out enumerated sites of the model.

    Raises:
        ValueError: naming the site.
    """
    in_model, in_guide = latent_sites(model_trace), latent_sites(guide_trace)
    auxiliary = {name for name, site in in_guide.items() if site["infer"].get("is_auxiliary")}
    only_guide = in_guide.keys() - in_model.keys() - auxiliary
    alone = in_model.keys() - in_guide.keys()
    enumerated = {name for name in alone if asks_to_be_enumerated(in_model[name])}
    if only_guide or alone - enumerated:
        raise ValueError(
            "Latent sites: expected the same in model and guide, got "
            f"{sorted(alone - enumerated) or 'none'} only in the model and {sorted(only_guide) or 'none'} "
            "only in the guide. To fix: rename one, or observe it (obs=...), or mark it: "
            "infer={'enumerate': 'parallel'} without num_samples in the model, infer={'is_auxiliary': True} "
            "in the guide."
        )
    if enumerated and not sums_out:
        raise ValueError(
            f"Sites {sorted(enumerated)} of the model: expected them in the guide, since {user} does not sum "
            "them out and would draw them from the prior. To fix: sample them in the guide, or use an ELBO "
            "that sums them out: IWAE, Renyi, DReG or TraceEnum_ELBO."
        )
    for name in in_model.keys() & in_guide.keys():
        p, q = in_model[name], in_guide[name]
        shape, expected = p["fn"].shape(), q["fn"].shape()
        if any("_enumerate_dim" in site["infer"] for site in in_model.values()):
            shape = shape[len(shape) - len(expected) :]  # without the dimensions of enumerated sites
        if shape != expected:
            raise ValueError(
                f"Site '{name}': expected the same shapes in model and guide, got batch shape "
                f"{tuple(p['fn'].batch_shape)} and event shape {tuple(p['fn'].event_shape)} in the model, "
                f"{tuple(q['fn'].batch_shape)} and {tuple(q['fn'].event_shape)} in the guide. To fix: make "
                "encoder, prior and plates agree."
            )
        if is_validation_enabled():
            _check_measures(name, p["fn"], q["fn"])
        # The scale of a point, and a mask inside it, do not matter: its log density is 0.
        is_point = isinstance(innermost(q["fn"]), Delta)
        if not same(p["scale"], q["scale"]) and not is_point:
            raise ValueError(
                f"Site '{name}': expected the same scale in model and guide, got {p['scale']} in the model "
                f"and {q['scale']} in the guide, which gives neither the ELBO nor a weighted one. To fix: "
                "give their plates the same size and subsample_size, and put a handler that scales around "
                "both."
            )
        if not (same(p["mask"], q["mask"]) and (is_point or masked_alike(p["fn"], q["fn"]))):
            raise ValueError(
                f"Site '{name}': expected the same mask in model and guide, got different ones, which gives "
                "no ELBO. To fix: put poutine.mask around the whole of both, or around observed sites only."
            )


def _check_measures(name: str, p: Any, q: Any) -> None:
    """Refuse a probability mass on one side and a density on the other."""
    try:
        agree = p.support.is_discrete == q.support.is_discrete
    except (NotImplementedError, AttributeError):
        return  # a family that does not say
    if not agree and not isinstance(innermost(q), Delta):
        raise ValueError(
            f"Site '{name}': expected probabilities in model and guide, or densities in both, got "
            f"{family(p)} in the model and {family(q)} in the guide, whose ratio gives no ELBO. To fix: use "
            "the same family, discrete or relaxed, on both sides."
        )


def check_rsample(guide_trace: poutine.Trace, *, user: str, but: Container[str] = ()) -> None:
    """Refuse draws of the guide that are not reparameterised.

    Args:
        guide_trace: the trace of the guide, with score parts.
        user: the name of the ELBO that needs reparameterised draws.
        but: sites that need no reparameterised draws.

    Raises:
        ValueError: naming the site.
    """
    for name, site in latent_sites(guide_trace).items():
        if name not in but and not is_identically_zero(site["score_parts"].score_function):
            raise ValueError(
                f"Site '{name}' of the guide, {family(innermost(site['fn']))}: expected a distribution with "
                f"rsample, since {user} differentiates through the draw, got one that is not "
                "reparameterised. To fix: use another family; or MeanField or IWAE, which take the score "
                "function; or TraceEnum_ELBO, which sums the site out."
            )


def asks_to_be_enumerated(site: Site) -> bool:
    """Return whether a latent site of the model asks to be summed out."""
    infer = site["infer"]
    return "_enumerate_dim" in infer or (
        infer.get("enumerate") == "parallel"
        and infer.get("num_samples") is None  # else Pyro draws, and sums nothing out
        and site["fn"].has_enumerate_support
    )


def data_plate_name(traces: Iterable[poutine.Trace]) -> str | None:
    """Return the name of the plate of the data: "data", else the only one that holds every site.

    If no plate holds every site (a latent that all data share), it is the only one that holds every observed
    site. Factors do not count. A plate in a loop holds no data side by side.

    Args:
        traces: the traces of a model and its guide.

    Returns:
        None if there is no such plate, or more than one.
    """
    sites = [site for trace in traces for site in density_sites(trace).values()]
    frames = [{frame.name: frame for frame in site["cond_indep_stack"]} for site in sites]
    if any("data" in of_site for of_site in frames):
        return "data"
    plates = [{name for name, frame in of_site.items() if frame.vectorized} for of_site in frames]
    observed = [names for names, site in zip(plates, sites, strict=True) if site["is_observed"]]
    for group in (plates, observed):
        common = set.intersection(*group) if group else set()
        if len(common) == 1:
            return common.pop()
    return None


def data_plate(name: str, site: Site, plate: str | None) -> CondIndepStackFrame:
    """Return the plate of the data around a site.

    Args:
        name: the name of the site.
        site: a site of a trace.
        plate: the name of the plate, as :func:`data_plate_name` found it.

    Raises:
        EvaluationError: if the site is outside it, or inside another plate that is subsampled, or if it is a
            loop.
    """
    frames = {frame.name: frame for frame in site["cond_indep_stack"]}
    plate = plate or "data"
    if plate not in frames:
        others = sorted(other for other, f in frames.items() if f.vectorized and other != "_particles")
        fix = (
            "rename the plate of the data to 'data', and put every site inside it."
            if others
            else f"put every site inside pyro.plate('{plate}', len(x)). For a site that all data share, "
            "train with Trace_ELBO, STL or MeanField; fit and svi.evaluate_loss(*batch) give its ELBO."
        )
        raise EvaluationError(
            f"Site '{name}': expected it inside the plate '{plate}', got the plates {others or 'none'}. "
            f"Outside, it has no log probability of one data point. To fix: {fix}"
        )
    if frames[plate].dim is None:
        raise EvaluationError(
            f"Site '{name}': expected the plate '{plate}' to be a dimension, got a loop over it. To fix: "
            f"write with pyro.plate('{plate}', len(x))."
        )
    for frame in frames.values():
        if frame.name != plate and frame.full_size not in (None, frame.size):
            raise EvaluationError(
                f"Site '{name}': expected its other plates to be whole, got '{frame.name}' with {frame.size} "
                f"of {frame.full_size}, so part of each data point is missing. To fix: subsample '{plate}' "
                "only."
            )
    return frames[plate]


def plate_size(site: Site, frame: CondIndepStackFrame) -> int:
    """Return how many members of a plate a site holds; the batch shape says it if the plate has no size."""
    if frame.size >= 0:
        return frame.size
    shape = site["fn"].batch_shape
    return int(shape[frame.dim]) if frame.dim is not None and len(shape) >= -frame.dim else 1


def by_dimension(fn: Any) -> Any:
    """Return the distribution of the single dimensions of an event, None if it is joint over them."""
    while isinstance(fn, Independent):
        fn = fn.base_dist
    return None if fn.event_dim else fn


def per_data_point(
    trace: poutine.Trace,
    weights: Mapping[str, float | Tensor],
    plate: str | None,
    particle_dim: int | None = None,
) -> Tensor:
    """Sum the unscaled, masked log probabilities of sites, each times its weight, for each data point.

    Enumerated sites are summed out exactly.

    Args:
        trace: the trace of model or guide, with log probabilities.
        weights: the weights of the sites to sum.
        plate: the name of the plate of the data.
        particle_dim: the batch dimension of the particles, if they were drawn side by side.

    Returns:
        The sum in nats, (particles, N), with 1 for particles if they have no dimension.
    """
    terms = []
    for log_prob, data_dim in _factors(trace, weights, plate):
        # The sum over enumerated sites drops dimensions of size 1.
        log_prob = log_prob[(None,) * (-(particle_dim or cast(int, data_dim)) - log_prob.dim())]
        rest = [dim for dim in range(-log_prob.dim(), 0) if dim not in (data_dim, particle_dim)]
        if rest:
            log_prob = log_prob.sum(rest)
        terms.append(log_prob if particle_dim else log_prob.unsqueeze(0))
    return sum(terms[1:], start=terms[0]) if terms else torch.zeros(1, 1)


def _factors(
    trace: poutine.Trace, weights: Mapping[str, float | Tensor], plate: str | None
) -> list[tuple[Tensor, int | None]]:
    """Return weighted, masked log probabilities and their data dimensions; enumerated sites summed out."""
    trace = prune_subsample_sites(trace)
    sites: list[Site] = [trace.nodes[name] for name in weights]
    data_dims = [data_plate(site["name"], site, plate).dim for site in sites]
    if not any("_enumerate_dim" in site["infer"] for site in sites):
        log_probs = [
            scale_and_mask(site["unscaled_log_prob"], scale=weights[site["name"]], mask=site["mask"])
            for site in sites
        ]
        return list(zip(log_probs, data_dims, strict=True))
    trace.pack_tensors()
    factors: OrderedDict[frozenset[str], list[Any]] = OrderedDict()
    for site in sites:
        # The probabilities of a site that is summed out still have to sum to one: they are never masked.
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
