"""locate: the site where the numbers of a run stop being finite."""

from typing import Any

import torch
from torch import Tensor

from pyro_vae.programs.batches import BOUND_THE_SCALE, parameter_fault
from pyro_vae.programs.observations import check_values, fault_at, holds_nan, nan_is_read
from pyro_vae.programs.pair import Pair
from pyro_vae.programs.traces import family, innermost, observed_sites, sample_sites

_COLLAPSED_SCALE = 1e-6  # of a guide: no posterior over latents of unit size is so narrow


def locate(pair: Pair, what: str) -> str:
    """Return where a non-finite loss or gradient comes from, by one more run of the pair.

    Run it with the random state and the buffers of the run that failed, so that it draws the same.

    Args:
        pair: the pair on the batch.
        what: the number that is not finite, as the beginning of a sentence.

    Returns:
        A sentence that names the site, or says that the run was finite this time.

    Raises:
        ValueError: where an observed value is at fault, like :func:`check_values`.
    """
    if fault := parameter_fault(pair):
        return f"{what}: {fault}"
    with pair.isolated(validate=False), torch.enable_grad():
        guide_trace = pair.trace_guide()
        model_trace = pair.trace_model(guide_trace)
        for name, site in observed_sites(model_trace).items():
            check_values(name, site)
        guide_trace.compute_log_prob()
        model_trace.compute_log_prob()
    nan_in_batch = holds_nan((*pair.args, *pair.kwargs.values()))
    sites = [
        (side, f"site '{name}' of the {side}, {family(site['fn'])},", site)
        for side, trace in (("guide", guide_trace), ("model", model_trace))
        for name, site in sample_sites(trace)
    ]
    for side, where, site in sites:
        if fault := fault_at(site):
            if nan_in_batch and "NaN" in fault:
                return (
                    f"{what}: {where} has {fault}. {nan_is_read(side, (*pair.args, *pair.kwargs.values()))}"
                )
            return f"{what}: {where} has {fault}.{_scales(side, site)} or look at the batch."
    for side, where, site in sites:
        log_prob = site["log_prob_sum"]
        if not log_prob.requires_grad:
            continue
        grads = torch.autograd.grad(log_prob, pair.trainable, allow_unused=True, retain_graph=True)
        if not all(grad.isfinite().all() for grad in grads if grad is not None):
            return (
                f"{what}: {where} has a finite log probability, but its gradient is not finite."
                f"{_scales(side, site)} or look for a square root or logarithm at 0."
            )
    return f"{what}, but no site shows why: a second run with the same noise was finite. Nothing was updated."


def _scales(side: str, site: Any) -> str:
    """Return the range of a site's scale, if it has one, and the first words of the fix."""
    scale = getattr(innermost(site["fn"]), "scale", None)
    if not isinstance(scale, Tensor) or not scale.numel() or scale.isnan().all():
        return " Nothing was updated. To fix: lower the learning rate,"
    finite = scale[~scale.isnan()]
    low, high = finite.min().item(), finite.max().item()
    extreme = 0 <= low < _COLLAPSED_SCALE or high > 1 / _COLLAPSED_SCALE
    fix = BOUND_THE_SCALE if side == "guide" and extreme else "bound the scale"
    return (
        f" Its scale is between {low:.2g} and {high:.2g}. Nothing was updated. To fix: lower the learning "
        f"rate, {fix},"
    )
