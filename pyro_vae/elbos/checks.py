"""Checks: pairs and batches that would silently give a wrong number, found and named.

Three mechanisms keep the hot path free of checks. *Structure* (site names, shapes, dtypes, plates, widths) is
checked by :func:`check_pair`, once for each signature of a pair. *Support* is part of the families'
mathematics: their ``log_prob`` is -inf outside it. A *non-finite* loss or gradient is traced to its
site by :func:`~pyro_vae.programs.faults.locate`, which runs the pair once more.
"""

import warnings
from collections.abc import Iterable
from typing import Any, cast

import torch
from pyro import poutine
from pyro.distributions import Unit
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_vae.elbos.analytic_kl import folds, has_closed_form, is_registered, kl_faults
from pyro_vae.elbos.capabilities import AnalyticKL, Capabilities, capabilities
from pyro_vae.elbos.kl_weight import active_weights
from pyro_vae.elbos.squashed_logits import warn_of_squashed_logits
from pyro_vae.programs import Pair, Traces
from pyro_vae.programs.batches import (
    check_not_empty,
    check_widths,
    is_out_of_memory,
    naming_the_batch,
    no_family,
)
from pyro_vae.programs.masks import same
from pyro_vae.programs.missing import LostNaNError
from pyro_vae.programs.names import check_apart, check_param_statements, name_apart
from pyro_vae.programs.observations import (
    check_observed,
    holds_nan,
    nan_is_read,
    without_nan,
)
from pyro_vae.programs.pair import leaves
from pyro_vae.programs.plates import find_layout
from pyro_vae.programs.traces import (
    check_latents,
    check_roles,
    check_rsample,
    data_plate_name,
    density_sites,
    family,
    innermost,
    latent_sites,
    plate_size,
    sample_sites,
)


def check_pair(pair: Pair, elbo: Any = None, optimised: Iterable[nn.Parameter] = ()) -> int | None:
    """Run a pair once on its batch and refuse what would be wrong, also if the error would be silent.

    The first batch of a signature is validated in full: its structure and its values, for any distribution
    and for any setting of Pyro's validation. Run it in a trial, since it changes buffers and the random
    state.

    Args:
        pair: the pair on a batch.
        elbo: the objective, if there is one: then it is run once too, with all of Pyro's checks.
        optimised: the parameters in the optimiser, which may differ from those of the pair's modules.

    Returns:
        The number of data points that the loss stands for. It is the size of their plate (of the whole plate
        where it is subsampled). Without any plate, it is the length of the first tensor; else None. It is 0
        if the pair made no sample statement, so that the loss of the batch is 0.

    Raises:
        ValueError: naming the site, what was expected, what was given and how to fix it.
    """
    check_not_empty(pair)
    if pair.model == pair.guide:
        raise ValueError(
            "Model and guide: expected two programs, got the same one on both sides, so its likelihood would "
            "cancel. To fix: pass a guide that draws the latents of the model."
        )
    _check_autoguides(pair)
    name_apart(pair.modules)
    name = "evaluation" if elbo is None else type(elbo).__name__
    able = Capabilities(sums_out=True, observes_guide=True) if elbo is None else capabilities(elbo)
    with pair.isolated(validate=True):
        traces = _trace(pair)
        if elbo is not None and traces.are_empty():
            return 0
        for side, trace in zip(traces._fields, traces, strict=True):
            if not all(hasattr(site["fn"], "batch_shape") for _, site in sample_sites(trace)):
                raise ValueError(no_family(side))
            _check_event_dims(side, trace)
        check_roles(*traces, user=name, observes_guide=able.observes_guide)
        check_widths(pair, *traces)
        check_observed(traces.model)
        check_latents(*traces, user=name, sums_out=able.sums_out)
        check_param_statements(pair, *traces)
        traces.guide.compute_score_parts()
        traces.model.compute_log_prob()
        if able.needs_rsample:
            check_rsample(traces.guide, user=name, but=_enumerated(traces) if able.enumerates_guide else ())
        if elbo is not None:
            _check_something_is_observed(pair)
            _check_guide_factors(name, pair, traces)
            if able.analytic_kl is AnalyticKL.ALWAYS:
                _check_closed_forms(name, pair, traces)
            if not able.weighs_each_data_point:
                _check_importance_weights(name, pair.args, traces)
            _check_scales_and_baselines(name, able, traces)
            warn_of_squashed_logits(pair, traces)
            if elbo.vectorize_particles and elbo.num_particles > 1 and not able.checks_particles:
                _check_particles(name, elbo.num_particles, pair)
            loss = _run_elbo(elbo, pair)
            # The run may have made parameters, as an autoguide does.
            owned = [p for root in pair.roots for p in root.parameters()]
            weights = [weight.beta for weight in active_weights(pair.model, pair.guide)]
            given = leaves((pair.args, pair.kwargs))
            _check_leaves(loss, set(map(id, (*owned, *optimised, *given, *weights))))
    modules = Pair(pair.model, pair.guide).modules  # the run may have made some, as an autoguide does
    name_apart(modules)
    check_apart(modules)
    return _num_data(pair, traces)


def _num_data(pair: Pair, traces: Traces) -> int | None:
    plate = data_plate_name(traces)
    sites = [site for trace in traces for site in density_sites(trace).values()]
    frames = [(site, frame) for site in sites for frame in site["cond_indep_stack"]]
    if plate is not None:
        return max(max(f.full_size or 0, plate_size(site, f)) for site, f in frames if f.name == plate)
    if any(frame.vectorized for _, frame in frames):
        return None
    values = (*pair.args, *pair.kwargs.values())
    return next((len(value) for value in values if getattr(value, "shape", ())), None)


def _check_event_dims(side: str, trace: poutine.Trace) -> None:
    """Refuse batch dimensions without a plate, whose log probabilities would count as several data."""
    for name, site in sample_sites(trace):
        plates = {frame.dim: frame.name for frame in site["cond_indep_stack"] if frame.vectorized}
        shape = site["fn"].batch_shape
        extra = [dim for dim in range(-len(shape), 0) if shape[dim] != 1 and dim not in plates]
        if extra:
            raise ValueError(
                f"Site '{name}' of the {side}, {family(site['fn'])}: expected batch dimensions for its "
                f"plates alone, {sorted(plates.values()) or 'none'}, got batch shape {tuple(shape)}. To fix: "
                f"end the distribution in .to_event({len(extra)}), if its last dimensions are one event; "
                "else put it into a pyro.plate."
            )


def _enumerated(traces: Traces) -> set[str]:
    sites = latent_sites(traces.guide).items()
    return {name for name, site in sites if site["infer"].get("enumerate")}


def _check_autoguides(pair: Pair) -> None:
    """Refuse an autoguide whose model is gone before the autoguide could read it."""
    for module in pair.modules:
        if isinstance(module, AutoGuide) and module.prototype_trace is None and module._model is None:
            raise ValueError(
                f"{type(module).__name__}: expected an autoguide with its model, got one without. Pyro takes "
                "the model from an autoguide that is copied or pickled, and from the copy. To fix: make the "
                "guide again, and run it once, guide(*batch), before you copy it."
            )


def _trace(pair: Pair) -> Traces:
    """Run the pair, without log probabilities."""
    guide_trace = None
    try:
        with naming_the_batch("guide", pair):
            guide_trace = pair.trace_guide()
        with naming_the_batch("model", pair):
            model_trace = pair.trace_model(guide_trace)
    except LostNaNError:
        raise
    except ValueError as error:
        # Bad data first show up as strange latents, or as a network that cannot run. A run of the model on
        # its prior, if it is possible, names the data instead.
        try:
            prior_trace = pair.trace_model()
        except Exception:
            prior_trace = None
        if prior_trace is not None:
            if guide_trace is not None:
                check_roles(prior_trace, guide_trace, user="evaluation", observes_guide=True)
                check_widths(pair, prior_trace, guide_trace)
            check_observed(prior_trace)
            if guide_trace is not None:
                check_latents(prior_trace, guide_trace, user="evaluation", sums_out=True)
        _check_nan_is_not_read(pair, guide_trace, error)
        raise
    return Traces(model_trace, guide_trace)


def _check_nan_is_not_read(pair: Pair, guide_trace: poutine.Trace | None, error: ValueError) -> None:
    """Refuse NaN in a batch if a program fails with it and runs without it."""
    if not holds_nan((*pair.args, *pair.kwargs.values())):
        return
    filled = pair.on(
        tuple(map(without_nan, pair.args)), {name: without_nan(v) for name, v in pair.kwargs.items()}
    )
    try:
        filled.trace_guide() if guide_trace is None else filled.trace_model(guide_trace)
    except Exception:  # fails for another reason
        return
    raise ValueError(
        nan_is_read("guide" if guide_trace is None else "model", (*pair.args, *pair.kwargs.values()))
    ) from error


def _check_something_is_observed(pair: Pair) -> None:
    """Refuse to train on a batch in which every entry is missing."""
    floats = [value for value in pair.args if isinstance(value, Tensor) and value.is_floating_point()]
    if floats and all(value.isnan().all() for value in floats):
        raise ValueError(
            f"The batch: expected some observed entries, got NaN in all {sum(v.numel() for v in floats):,}. "
            "To fix: look at how the data were standardised. A mean over a column with NaN is NaN: "
            "numpy.nanmean and nanstd leave NaN out."
        )


def _check_guide_factors(elbo: str, pair: Pair, traces: Traces) -> None:
    """Refuse factors of the guide that a gradient, or a KL weight, would leave out."""
    factors = [name for name, site in sample_sites(traces.guide) if isinstance(site["fn"], Unit)]
    if not factors:
        return
    with torch.enable_grad():
        trace = pair.trace_guide()
    for name in factors:
        fn: Any = trace.nodes[name]["fn"]
        if fn.log_factor.requires_grad and not fn.has_rsample:
            raise ValueError(
                f"Factor '{name}' of the guide: expected has_rsample=True, got False, for which {elbo} would "
                "lack its gradient. To fix: give True if it is a penalty or the density of a draw with a "
                "path; write any other density as a distribution, by pyro.sample."
            )
        if active_weights(pair.model, pair.guide):
            raise ValueError(
                f"Factor '{name}' of the guide: expected none under scale_latents, which would weight only "
                "the rest of log q, got one. To fix: write it as a distribution, by pyro.sample."
            )


def _check_closed_forms(elbo: str, pair: Pair, traces: Traces) -> None:
    """Refuse an analytic KL where it is not the KL of the pair."""
    for name, why in kl_faults(pair, traces).items():
        q, p = (cast(Distribution, trace.nodes[name]["fn"]) for trace in (traces.guide, traces.model))
        if has_closed_form(q, p):
            raise ValueError(
                f"Site '{name}': expected its parents in the model not to depend on it in the guide, since "
                f"{elbo} takes its KL in closed form, which is wrong here: {why}. To fix: draw the guide's "
                "sites in the model's order, or use Trace_ELBO or MeanField."
            )
    in_model, in_guide = latent_sites(traces.model), latent_sites(traces.guide)
    for name in in_model.keys() & in_guide.keys():
        q, p = in_guide[name]["fn"], in_model[name]["fn"]
        if folds(q, p) and is_registered(q, p):
            raise ValueError(
                f"Site '{name}': expected no folded distribution, since {elbo} would take the KL of what is "
                f"folded, got {family(q)}. To fix: use Trace_ELBO or MeanField."
            )
    for name, site in in_guide.items():
        log_density = getattr(innermost(site["fn"]), "log_density", None)
        if log_density is not None and not same(log_density, 0.0):
            raise ValueError(
                f"Site '{name}' of the guide: expected no point with a density, which an autoguide makes for "
                f"a constrained latent, since {elbo} would leave the density out. To fix: use Trace_ELBO."
            )


def _check_importance_weights(elbo: str, args: tuple[Any, ...], traces: Traces) -> None:
    """Refuse one importance weight for all data where each data point has its own latents."""
    sites = [site for trace in traces for site in sample_sites(trace)]
    plates = {
        name: {frame.name for frame in site["cond_indep_stack"] if frame.vectorized} for name, site in sites
    }
    local = [plates[name] for name, site in sites if not site["is_observed"]]
    outside = [name for name in plates if local and set.intersection(*local) - plates[name]]
    batch = next((len(value) for value in args if isinstance(value, Tensor) and value.dim()), 1)
    no_plate = (
        batch > 1
        and not any(plates.values())
        and all(site["fn"].shape()[:1] == (batch,) for _, site in sites)
    )
    if outside or no_plate:
        which = f"site '{outside[0]}'" if outside else "all sites"
        raise ValueError(
            f"Every site: expected inside the plate of the data, got {which} outside it. {elbo} would "
            "give all data one importance weight, which is a loose bound. To fix: put every site inside "
            "pyro.plate('data', len(x)), or use IWAE."
        )


def _check_scales_and_baselines(elbo: str, able: Capabilities, traces: Traces) -> None:
    for trace in traces:
        for name, site in sample_sites(trace):
            if not able.accepts_scales and not same(site["scale"], 1.0):
                raise ValueError(
                    f"Site '{name}': expected no scale, got {site['scale']}. {elbo} would put it inside its "
                    "logarithm, which is no bound. To fix: use whole plates, pyro.plate('data', len(x)), or "
                    "IWAE."
                )
            if site["infer"].get("baseline", {}).get("use_decaying_avg_baseline"):
                raise ValueError(
                    f"Site '{name}': expected a baseline in a module, got a decaying average, which Pyro "
                    "keeps in its global store. To fix: infer={'baseline': {'nn_baseline': ...}}."
                )


def _check_particles(elbo: str, num_particles: int, pair: Pair) -> None:
    if find_layout(pair, particles=True).particle_dim is None:
        raise ValueError(
            f"Model and guide: expected networks that take any leading dimensions, since {elbo} draws "
            f"{num_particles} particles side by side, got one that fails on them or mixes them up, as "
            "BatchNorm and convolutions do, or a flow without an inverse, which cannot be checked. To fix: "
            "flatten leading dimensions around such a layer, or use vectorize_particles=False."
        )


def _run_elbo(elbo: Any, pair: Pair) -> Any:
    """Run the ELBO once under Pyro's validation. The steps run without it."""
    run = getattr(elbo, "differentiable_loss", None) or getattr(elbo, "loss", None)
    if run is None or not hasattr(elbo, "loss"):
        raise ValueError(
            f"loss: expected {type(elbo).__name__} to have a method loss(model, guide, *args, **kwargs) that "
            "returns a float, got none. To fix: write it beside differentiable_loss."
        )
    try:
        with warnings.catch_warnings(action="ignore"), torch.enable_grad():
            loss = run(pair.model, pair.guide, *pair.args, **pair.kwargs)
            if isinstance(loss, Tensor) and loss.numel() != 1:
                raise ValueError(
                    f"expected one loss, summed over the batch, got shape {tuple(loss.shape)}. To fix: end "
                    "in .sum()."
                )
            if not isinstance(loss, Tensor) and hasattr(elbo, "differentiable_loss"):
                raise ValueError(
                    f"expected differentiable_loss to return a tensor, got {type(loss).__name__}. To fix: "
                    "leave .item() and float() to the method loss."
                )
            return loss
    except (NotImplementedError, RuntimeError, TypeError, ValueError, AssertionError) as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(f"{type(elbo).__name__} cannot handle this model and guide: {error}") from error


def _check_leaves(loss: Any, known: set[int]) -> None:
    """Refuse a loss that depends on a parameter outside the optimiser, such as one in a closure."""
    todo, seen = [getattr(loss, "grad_fn", None)], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo += [function for function, _ in node.next_functions]
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, nn.Parameter) and id(leaf) not in known:
            raise ValueError(
                f"A parameter of shape {tuple(leaf.shape)}, on which the loss depends: expected it in a "
                "module of model or guide, got one that belongs to no module of them, so it would not train. "
                "To fix: make model and guide modules that hold what they use, not functions that close over "
                "it."
            )
        if leaf is not None and id(leaf) not in known:
            raise ValueError(
                f"A tensor of shape {tuple(leaf.shape)} that requires gradients, on which the loss depends: "
                "expected an nn.Parameter of model or guide, got a plain tensor, which would not train. To "
                "fix: wrap it in nn.Parameter, or detach it."
            )
