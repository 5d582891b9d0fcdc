"""Checks before an evaluation: its numbers must be those of the whole batch, and of each data point."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

from pyro.distributions import Delta
from pyro.infer.autoguide import AutoCallable, AutoGuide, AutoGuideList
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from pyro_vae.elbos.checks import check_pair
from pyro_vae.programs import Pair, Traces
from pyro_vae.programs.batches import naming_the_batch
from pyro_vae.programs.pair import leaves
from pyro_vae.programs.traces import (
    EvaluationError,
    Site,
    data_plate_name,
    density_sites,
    innermost,
    latent_sites,
    observed_sites,
    plate_size,
    sample_sites,
)


def check_whole(pair: Pair) -> tuple[Traces, str | None]:
    """Check a pair as :func:`check_pair` does, and check that an evaluation would cover the whole batch.

    Buffers and random state stay as they were.

    Returns:
        A run of the pair, and the name of the plate of its data.

    Raises:
        EvaluationError: if an autoguide holds the posteriors of other data.
        ValueError: naming the site or the plate, what was expected, what was given and how to fix it.
    """
    with pair.trial(), refusing_train_mode(pair):
        _check_own_data(pair)
        check_pair(pair)
        with pair.isolated(validate=False):
            traces = pair.trace()
    plate = data_plate_name(traces)
    sizes = {
        plate_size(site, frame)
        for _, site in sample_sites(traces.model)
        for frame in site["cond_indep_stack"]
        if frame.name == plate
    }
    num_data = len(pair.args[0])
    if sizes - {num_data}:
        raise ValueError(
            f"The plate '{plate}': expected all {num_data} data points of the batch for evaluation, got a "
            f"plate that draws {sorted(sizes)[0]} of them. To fix: draw the subsample outside, and give the "
            "plate subsample_size=len(x)."
        )
    return traces, plate


@contextmanager
def refusing_train_mode(pair: Pair) -> Iterator[None]:
    """Refuse Dropout and BatchNorm in train mode among modules that run, but are not those of the pair."""
    own = set(pair.modules)

    def see(module: nn.Module, _: Any) -> None:
        acts = "Dropout" in type(module).__name__ or hasattr(module, "running_mean")
        if module.training and acts and module not in own:
            raise ValueError(
                f"Model and guide: expected all modules inside them, so that an evaluation runs them in eval "
                f"mode, got a {type(module).__name__} in train mode, which they reach through a closure or "
                "another object. To fix: pass a module that holds it, or call eval() on it."
            )

    handle = register_module_forward_pre_hook(see)
    try:
        yield
    finally:
        handle.remove()


def check_no_points(traces: Traces) -> None:
    """Refuse a guide that draws a latent as a point, since its weights are no importance weights.

    Beside auxiliary sites it may: they have the density of the point, as in autoguides. A latent outside all
    plates has no number for each data point, which is another error.

    Raises:
        EvaluationError: naming the site.
    """
    in_model, in_guide = latent_sites(traces.model), latent_sites(traces.guide)
    if in_guide.keys() - in_model.keys():
        return
    found = _points(in_guide) - _points(in_model)
    if found := {name for name in found if in_guide[name]["cond_indep_stack"]}:
        raise EvaluationError(
            f"Site '{min(found)}' of the guide: expected a density, by which a draw is weighed, got a point "
            "(Delta). To fix: use a guide with densities, such as pyro_vae.Guide with DiagNormal; or take "
            "elbo_terms(model, guide, x).elbo, which is log p(x, z) at the point."
        )


def _points(sites: dict[str, Site]) -> set[str]:
    return {name for name, site in sites.items() if isinstance(innermost(site["fn"]), Delta)}


def check_factors(traces: Traces) -> None:
    """Refuse factors that may be a density, since an evaluation leaves factors out.

    Raises:
        EvaluationError: naming the factor.
    """
    observed, points = observed_sites(traces.model), _points(latent_sites(traces.guide))
    for program, trace, why in (
        ("model", traces.model, "" if observed else "the model observes nothing else"),
        ("guide", traces.guide, f"site '{min(points)}' is a point without a density" if points else ""),
    ):
        factors = dict(sample_sites(trace)).keys() - density_sites(trace).keys()
        if why and factors:
            raise EvaluationError(
                f"Factor '{min(factors)}' of the {program}: expected no density in it, since factors are "
                f"left out of log p(x, z) and log q(z | x), got a pair in which {why}. To fix: write it as a "
                "distribution, by pyro.sample, or use svi.evaluate_loss(*batch), which keeps factors."
            )


def holds_posteriors(pair: Pair) -> bool:
    """Return whether an autoguide may hold a posterior for each data point, so that no batch can be split."""
    traces = [guide.prototype_trace for guide in _autoguides(pair)]
    return any(
        trace is None or any(site["cond_indep_stack"] for site in latent_sites(trace).values())
        for trace in traces
    )


def _autoguides(pair: Pair) -> list[Any]:
    """Return the autoguides with their own parameters, except those whose plates the user makes."""
    found = (module for module in pair.modules if isinstance(module, AutoGuide))
    return [
        guide
        for guide in found
        if not isinstance(guide, AutoGuideList | AutoCallable)
        and (guide.master() if guide.master else guide).create_plates is None
    ]


def _check_own_data(pair: Pair) -> None:
    """Refuse an autoguide over latents of each data point if the data differ from those of its set-up."""
    guides = [guide for guide in _autoguides(pair) if guide.prototype_trace is not None]
    if not guides:
        return
    with pair.isolated(validate=False), naming_the_batch("model", pair):
        plate = data_plate_name([pair.trace_model()])
    for guide in guides:
        batch = guide.prototype_trace.nodes["_INPUT"]
        for name, site in latent_sites(guide.prototype_trace).items():
            frames = [frame for frame in site["cond_indep_stack"] if frame.name == plate]
            subsampled = any(frame.full_size not in (None, frame.size) for frame in frames)
            if frames and (
                subsampled or not _equal((batch["args"], batch["kwargs"]), (pair.args, pair.kwargs))
            ):
                raise EvaluationError(
                    f"Site '{name}' of the guide, {type(guide).__name__}: expected the batch that it was set "
                    "up with, whole, since it holds a posterior for each data point, got other data. To fix: "
                    "use a guide with an encoder, such as pyro_vae.Guide, or evaluate that batch. For a "
                    "subsampled plate, pass the indices and create_plates=... to the autoguide."
                )


def _equal(first: Any, second: Any) -> bool:
    """Return whether two batches hold the same values."""
    pairs = list(zip_longest(leaves(first), leaves(second)))
    return all(
        bool((a.eq(b) | (a.ne(a) & b.ne(b))).all())
        if isinstance(a, Tensor) and isinstance(b, Tensor) and (a.shape, a.device) == (b.shape, b.device)
        else a is b or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and (a == b) is True)
        for a, b in pairs
    )
