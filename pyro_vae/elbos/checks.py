"""Diagnostics: pairs that would give a wrong number silently, found and named.

Three mechanisms keep the hot path clean. *Structure* (site names, shapes, dtypes, plates, widths) is
checked by :func:`check_pair` once per signature of the input. *Support* is in the families'
mathematics: their ``log_prob`` is -inf outside it. A *non-finite* loss or gradient is traced to its
site by :func:`locate`, which runs the pair once more.
"""

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.infer import RenyiELBO, TraceEnum_ELBO, TraceMeanField_ELBO, TraceTMC_ELBO
from torch import Tensor, nn

from pyro_vae.elbos.objective import Objective
from pyro_vae.programs.dependencies import has_closed_form, kl_faults
from pyro_vae.programs.observations import check_observed, check_values, fault_at
from pyro_vae.programs.pair import Program, modules, own_parameters, parameters, rehearsal
from pyro_vae.programs.plates import layout
from pyro_vae.programs.traces import (
    data_plate,
    family,
    innermost,
    latent_sites,
    observed_sites,
    sample_sites,
    traces,
)


def check_pair(
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    elbo: Any = None,
    trained: Iterable[nn.Parameter] = (),
) -> int | None:
    """Run model and guide once on a batch and refuse what would be wrong, or silently so.

    The first batch of a signature is validated fully: structure, and the values too, whatever the
    distribution and whatever Pyro's validation flag. Run it in a rehearsal: it moves buffers and the
    random state.

    Args:
        model: makes Pyro statements.
        guide: likewise.
        args: a batch, as both take it.
        kwargs: likewise.
        elbo: the objective, if there is one: then it is run once too, with all of Pyro's checks.
        trained: parameters that the optimiser holds, besides those of the pair's modules.

    Returns:
        The size of the model's plate "data" (of the whole where it is subsampled), None without it.

    Raises:
        ValueError: naming the site, what was expected, what came and the mend.
    """
    _check_not_empty(args)
    with own_parameters(model, guide, validate=True):
        guide_trace = None
        try:
            guide_trace = _run(guide, "guide", args, kwargs)
            model_trace = _run(poutine.replay(model, trace=guide_trace), "model", args, kwargs)
        except ValueError:
            # What does not fit shows first as strange latents or as a network that cannot run. A run
            # of the model on its prior, where there can be one, tells of it as what it is.
            try:
                prior_trace = _run(model, "model", args, kwargs)
            except Exception:
                prior_trace = None
            if prior_trace is not None:
                check_observed(prior_trace)
                if guide_trace is not None:
                    _check_latents(prior_trace, guide_trace)
            raise
        check_observed(model_trace)
        _check_latents(model_trace, guide_trace)
        _check_statements(model, guide, model_trace, guide_trace)
        guide_trace.compute_log_prob()
        model_trace.compute_log_prob()
        if elbo is not None:
            if isinstance(elbo, TraceMeanField_ELBO):
                _check_closed_forms(model, guide, args, kwargs, model_trace, guide_trace)
            if isinstance(elbo, RenyiELBO):
                _check_weights(args, model_trace, guide_trace)
            _check_elbo(elbo, model_trace, guide_trace)
            side_by_side = getattr(elbo, "vectorize_particles", False) and elbo.num_particles > 1
            if side_by_side and not isinstance(elbo, Objective):  # which looks for itself
                _check_particles(elbo, layout(model, guide, args, kwargs, particles=True).particle_dim)
            loss = _try_elbo(elbo, model, guide, args, kwargs)
            _check_leaves(loss, {id(p) for p in (*_owned(model, guide), *trained)})
    sizes = (
        frame.full_size
        for _, site in sample_sites(model_trace)
        for frame in site["cond_indep_stack"]
        if frame.name == "data"
    )
    return next(sizes, None)


def check_whole(model: Program, guide: Program, args: tuple[Any, ...]) -> None:
    """Check a pair as :func:`check_pair` does, and that its plate "data" holds the whole batch.

    It leaves buffers and random state as they were.

    Raises:
        ValueError: naming the site or the plate, what was expected, what came and the mend.
    """
    with rehearsal(model, guide):
        check_pair(model, guide, args, {})
        with own_parameters(model, guide, validate=False):
            model_trace, _ = traces(model, guide, args, {})
    sizes = {data_plate(name, site).size for name, site in sample_sites(model_trace)}
    if sizes - {len(args[0])}:
        raise ValueError(
            f"The plate 'data' draws {sorted(sizes)[0]} of the {len(args[0])} data given. Expected all of "
            "them for evaluation: draw the subsample outside, and give the plate subsample_size=len(x)."
        )


def _check_not_empty(args: tuple[Any, ...]) -> None:
    batch = next((value for value in args if isinstance(value, Tensor) and value.dim()), None)
    if batch is not None and not batch.numel():
        raise ValueError(
            f"The batch is empty: a tensor of shape {tuple(batch.shape)} came. Expected at least "
            "one datum; leave empty batches out."
        )


def _run(program: Program, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> poutine.Trace:
    """Trace a program; what torch says of unfit tensors becomes a ValueError with their shapes."""
    try:
        return poutine.trace(program).get_trace(*args, **kwargs)
    except (RuntimeError, TypeError, IndexError, NotImplementedError) as error:
        came = ", ".join(
            f"{tuple(value.shape)} {value.dtype}"
            for value in [*args, *kwargs.values()]
            if isinstance(value, Tensor)
        )
        raise ValueError(
            f"The {name} cannot run on this batch of {came or 'no tensor'}: {error}. Expected a "
            f"batch as the {name}'s networks were built for, floats of shape (batch, width)."
        ) from error


def _check_latents(model_trace: poutine.Trace, guide_trace: poutine.Trace) -> None:
    in_model = latent_sites(model_trace)
    in_guide = latent_sites(guide_trace)
    enumerated = {
        name
        for name, site in in_model.items()
        if site["infer"].get("enumerate") == "parallel" and site["fn"].has_enumerate_support
    }
    auxiliary = {name for name, site in in_guide.items() if site["infer"].get("is_auxiliary")}
    only_model = set(in_model) - set(in_guide) - enumerated
    only_guide = set(in_guide) - set(in_model) - auxiliary
    if only_model or only_guide:
        raise ValueError(
            "Model and guide must sample the same latent sites. Only in the model: "
            f"{sorted(only_model) or 'none'}; only in the guide: {sorted(only_guide) or 'none'}. "
            "Rename one, or mark it: infer={'enumerate': 'parallel'} in the model, "
            "infer={'is_auxiliary': True} in the guide."
        )
    for name in in_model.keys() & in_guide.keys():
        p, q = in_model[name], in_guide[name]
        if p["fn"].shape() != q["fn"].shape():
            raise ValueError(
                f"Site '{name}' has batch shape {tuple(p['fn'].batch_shape)} and event shape "
                f"{tuple(p['fn'].event_shape)} in the model, {tuple(q['fn'].batch_shape)} and "
                f"{tuple(q['fn'].event_shape)} in the guide. Expected the same: make encoder, prior "
                "and plates agree."
            )
        if not _same(p["scale"], q["scale"]) and not isinstance(innermost(q["fn"]), Delta):
            raise ValueError(
                f"Site '{name}' is scaled by {p['scale']} in the model and by {q['scale']} in the guide, "
                "which gives neither ELBO. Expected the same: give both the same plate sizes and scale both "
                "sides alike."
            )
        if not _same(*(True if site["mask"] is None else site["mask"] for site in (p, q))):
            raise ValueError(
                f"Site '{name}' is masked differently in model and guide, which gives no ELBO. "
                "Expected the same mask: put poutine.mask around the whole of both, or around observed sites."
            )


def _same(p: Any, q: Any) -> bool:
    return bool((torch.as_tensor(p) == torch.as_tensor(q)).all())


def _check_elbo(elbo: Any, model_trace: poutine.Trace, guide_trace: poutine.Trace) -> None:
    """Refuse pairs on which this ELBO would be wrong, and Pyro says nothing."""
    alone = latent_sites(model_trace).keys() - latent_sites(guide_trace).keys()
    if alone and not (isinstance(elbo, TraceEnum_ELBO | TraceTMC_ELBO) or getattr(elbo, "sums_out", False)):
        raise ValueError(
            f"{type(elbo).__name__} would draw {sorted(alone)} from the prior, which is no ELBO. "
            "Expected every latent site in the guide: give it one, or sum it out with IWAE or TraceEnum_ELBO."
        )
    for name, site in (*sample_sites(model_trace), *sample_sites(guide_trace)):
        if isinstance(elbo, RenyiELBO | TraceTMC_ELBO) and not _same(site["scale"], 1.0):
            raise ValueError(
                f"Site '{name}' is scaled by {site['scale']}, and {type(elbo).__name__} would put the scale "
                "inside its logarithm, which is no bound. Expected whole plates and no scale: use "
                "pyro.plate('data', len(x))."
            )
        if site["infer"].get("baseline", {}).get("use_decaying_avg_baseline"):
            raise ValueError(
                f"Site '{name}' asks for a decaying average as its baseline, which Pyro keeps in its global "
                "store. Expected a baseline in a module: infer={'baseline': {'nn_baseline': ...}}."
            )


def _try_elbo(
    elbo: Any, model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run the ELBO once under Pyro's validation, which the steps go without."""
    run = getattr(elbo, "differentiable_loss", elbo.loss)
    try:
        with warnings.catch_warnings(action="ignore"), torch.enable_grad():
            return run(model, guide, *args, **kwargs)
    except (NotImplementedError, RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"{type(elbo).__name__} does not serve this model and guide: {error}") from error


def _check_leaves(loss: Any, known: set[int]) -> None:
    """Refuse a loss that depends on a parameter which nobody would train, one in a closure say."""
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
                f"The loss depends on a parameter of shape {tuple(leaf.shape)} that belongs to no module "
                "of model or guide, so it would not train. Expected model and guide to be modules that hold "
                "what they use, not functions that close over it."
            )


def _owned(*programs: Program) -> list[nn.Parameter]:
    return [p for owner in modules(*programs) for p in owner.parameters()]


def _check_closed_forms(
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    model_trace: poutine.Trace,
    guide_trace: poutine.Trace,
) -> None:
    """Refuse an analytic KL where it is not the KL of the pair."""
    for name, why in kl_faults(model, guide, args, kwargs, model_trace, guide_trace).items():
        if has_closed_form(guide_trace.nodes[name]["fn"], model_trace.nodes[name]["fn"]):
            raise ValueError(
                f"TraceMeanField_ELBO would take the KL of site '{name}' in closed form, which is wrong: "
                f"{why}. Expected a latent's parents in the model not to depend on it in the guide: draw the "
                "guide's sites in the model's order, or use Trace_ELBO."
            )
    for name, site in latent_sites(guide_trace).items():
        log_density = getattr(innermost(site["fn"]), "log_density", None)
        if log_density is not None and not _same(log_density, 0.0):
            raise ValueError(
                f"Site '{name}' of the guide is a point with a density, as an autoguide makes of a "
                "constrained latent, and TraceMeanField_ELBO would leave the density out. Expected none: use "
                "Trace_ELBO."
            )


def _check_weights(args: tuple[Any, ...], model_trace: poutine.Trace, guide_trace: poutine.Trace) -> None:
    """Refuse one importance weight for all data where each has latents of its own."""
    sites = [*sample_sites(model_trace), *sample_sites(guide_trace)]
    plates = {
        key: {frame.name for frame in site["cond_indep_stack"] if frame.vectorized} for key, site in sites
    }
    local = [plates[key] for key, site in sites if not site["is_observed"]]
    outside = [key for key in plates if local and set.intersection(*local) - plates[key]]
    batch = next((len(value) for value in args if isinstance(value, Tensor) and value.dim()), 1)
    hidden = (
        batch > 1
        and not any(plates.values())
        and all(site["fn"].shape()[:1] == (batch,) for _, site in sites)
    )
    if outside or hidden:
        which = f"site '{outside[0]}' stands" if outside else "all sites stand"
        raise ValueError(
            "RenyiELBO would give all data one importance weight, which is a loose bound, since "
            f"{which} outside the plate of the data. Expected every site inside "
            "pyro.plate('data', len(x))."
        )


def _check_particles(elbo: Any, dim: int | None) -> None:
    if dim is None:
        raise ValueError(
            f"{type(elbo).__name__} draws {elbo.num_particles} particles side by side, and model or guide "
            "cannot run so, or mixes them up: a network reads meaning into its leading dimensions, as "
            "BatchNorm and convolutions do. Expected any leading dimensions: flatten them around such a "
            "layer, or use vectorize_particles=False."
        )


def _check_statements(
    model: Program, guide: Program, model_trace: poutine.Trace, guide_trace: poutine.Trace
) -> None:
    """Refuse ``pyro.param`` statements outside modules: a fresh store would remake them each step."""
    owned = {id(p): p for p in _owned(model, guide)}
    for trace in (model_trace, guide_trace):
        for name, site in trace.nodes.items():
            if site["type"] != "param":
                continue
            value: Any = site["value"]
            if id(getattr(value, "unconstrained", lambda value=value: value)()) not in owned:
                if not all(p.is_contiguous() for p in owned.values()):
                    raise ValueError(
                        f"The parameter '{name}' is not contiguous in memory, and Pyro would train a copy "
                        "of it. Expected contiguous parameters: p.data = p.data.contiguous()."
                    )
                raise ValueError(
                    f"The parameter '{name}' belongs to no module of model or guide. Expected "
                    "parameters in modules: make the program a PyroModule that holds it as an "
                    "nn.Parameter, a PyroParam or a submodule."
                )


def locate(model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any], what: str) -> str:
    """Say where a non-finite loss or gradient comes from, by one more run of the pair.

    Run it on the random state and the buffers of the run that failed, so that it draws the same.

    Raises:
        ValueError: where an observed value is at fault, as :func:`check_values` says it.

    Returns:
        A sentence that names the site, or says that the run was finite this time.
    """
    nets = nn.ModuleList(modules(model, guide))
    for name, parameter in nets.named_parameters():
        if not parameter.isfinite().all():
            return f"{what}: parameter '{name}' holds NaN or infinity. Start again from finite ones."
    with own_parameters(model, guide, validate=False), torch.enable_grad():
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        replayed = poutine.replay(model, trace=guide_trace)
        model_trace = poutine.trace(replayed).get_trace(*args, **kwargs)
        for name, site in observed_sites(model_trace).items():
            check_values(name, site)
        guide_trace.compute_log_prob()
        model_trace.compute_log_prob()
    for side, trace in (("guide", guide_trace), ("model", model_trace)):
        for name, site in sample_sites(trace):
            fault = fault_at(site)
            if fault:
                return (
                    f"{what}: site '{name}' of the {side}, {family(site['fn'])}, has {fault}. "
                    "Nothing was updated. Lower the learning rate, bound the scale, or look at the "
                    "batch."
                )
    trained = parameters(model, guide)
    for side, trace in (("guide", guide_trace), ("model", model_trace)):
        for name, site in sample_sites(trace):
            log_prob = site["log_prob_sum"]
            if not log_prob.requires_grad:
                continue
            grads = torch.autograd.grad(log_prob, trained, allow_unused=True, retain_graph=True)
            if not all(grad.isfinite().all() for grad in grads if grad is not None):
                return (
                    f"{what}: the log probability of site '{name}' of the {side}, "
                    f"{family(site['fn'])}, is finite but its gradient is not. Nothing was "
                    "updated. Look for a square root or logarithm at 0, or lower the learning rate."
                )
    return f"{what}, but no site shows why: a second run with the same noise was finite. Nothing was updated."
