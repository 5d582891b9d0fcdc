"""Values: the numbers at a site, observed ones that do not fit and any that is not finite."""

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any, NoReturn

import torch
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import constraints

from pyro_vae.programs.traces import Site, family, innermost, observed_sites


def check_observed(trace: Trace) -> None:
    """Refuse observed values of another form than a draw's, or that their distribution cannot have.

    Raises:
        ValueError: naming the site, what was expected, what came and the mend.
    """
    for name, site in observed_sites(trace).items():
        if isinstance(site["value"], Tensor):
            _check_form(name, site)
            check_values(name, site)


def _check_form(name: str, site: Site) -> None:
    """Refuse an observed value whose dtype or shape is not that of a draw."""
    fn, value = site["fn"], site["value"]
    what = f"Site '{name}' of the model, {family(fn)},"
    try:
        expected, shape = fn.sample().dtype, fn.shape()
    except (NotImplementedError, AssertionError):
        return  # a likelihood that cannot be sampled, or is as long as what it observes
    if expected.is_floating_point:
        if value.dtype in _TO_FLOAT:
            raise ValueError(f"{what} observes {value.dtype}. Expected {expected}: {_TO_FLOAT[value.dtype]}")
        if value.dtype == torch.float64 != expected:
            raise ValueError(
                f"{what} observes torch.float64. Expected {expected}: convert the batch with "
                "x.float(), or model and guide with .double()."
            )
    if value.shape != shape:
        raise ValueError(
            f"{what} observes a tensor of shape {tuple(value.shape)}. Expected "
            f"{tuple(shape)}, batch then event, and no broadcasting. Give a batch of flat images "
            "(x.flatten(1), or x.flatten().unsqueeze(0) for a single one), as wide as the decoder."
        )


def check_values(name: str, site: Site) -> None:
    """Refuse observed values that are not finite or outside the support of their distribution.

    Raises:
        ValueError: as :func:`check_observed`.
    """
    fn, value = site["fn"], site["value"]
    what = f"Site '{name}' of the model, {family(fn)},"
    if value.is_floating_point() and not value.isfinite().all():
        raise ValueError(
            f"{what} observes NaN or infinity in {_count(~value.isfinite())}. Expected finite "
            "values, also under a mask: fill missing ones with any value of the support."
        )
    try:
        support = fn.support
    except NotImplementedError:
        return
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    inside = support.check(value)
    if not inside.all():
        outside = value[~inside].flatten()
        if _is_8_bit(value):
            mend = "These look like 8-bit grey levels: divide them by 255."
        elif support is constraints.boolean and value.min() >= 0 and value.max() <= 1:
            mend = (
                "Binarise grey pixels (pyro_vae.data.DynamicBinarisation()), or observe them under "
                "ContinuousBernoulli() or Categorical(levels)."
            )
        else:
            mend = "Pixels are floats in [0, 1], K grey levels k / (K - 1)."
        raise ValueError(
            f"{what} observes values outside its support in {_count(~inside)}, for example "
            f"{outside[0].item():.4g}. Expected {_describe(support)}. {mend}"
        )
    # A Gaussian accepts any real number, so images of 0 .. 255 have to be told by their looks.
    image = support is constraints.real and fn.event_shape.numel() >= 64
    if image and _is_8_bit(value) and value.max() >= 128:
        raise ValueError(
            f"{what} observes whole numbers up to {int(value.max())}. Expected pixels in [0, 1]: "
            "these look like 8-bit grey levels, divide them by 255."
        )


def _is_8_bit(value: Tensor) -> bool:
    whole = value.is_floating_point() and bool((value == value.round()).all())
    return whole and bool(value.min() >= 0) and bool(1 < value.max() <= 255)


_TO_FLOAT = {
    torch.uint8: "convert 8-bit images with x.float() / 255.",
    torch.bool: "convert binary images with x.float().",
}


def fault_at(site: Site) -> str:
    """Say what is wrong with the numbers at a site: in its distribution, its value or its density."""
    inner = innermost(site["fn"])
    for name in getattr(inner, "arg_constraints", {}):
        parameter = inner.__dict__.get(name)
        if isinstance(parameter, Tensor):
            if not parameter.isfinite().all():
                return f"NaN or infinity in its {name}"
            if not inner.arg_constraints[name].check(parameter).all():
                return f"a {name} outside {_describe(inner.arg_constraints[name])}"
    if isinstance(site["value"], Tensor) and not site["value"].isfinite().all():
        return "a sampled value that is NaN or infinite"
    if not site["log_prob"].isfinite().all():
        return "a log probability that is NaN or infinite"
    return ""


def _describe(support: Any) -> str:
    if support is constraints.boolean:
        return "0 or 1"
    return str(support).removesuffix("()")


def _count(wrong: Tensor) -> str:
    return f"{int(wrong.sum()):,} of {wrong.numel():,} values"


def check_finite(loss: float | Tensor, gradients: Sequence[Tensor] = ()) -> None:
    """Refuse a loss or gradients that are not finite.

    Raises:
        FloatingPointError: saying which.
    """
    if not math.isfinite(loss):
        _refuse(f"The loss is {float(loss)}")
    # A sum of finite numbers may overflow: then each is asked.
    if gradients and not sum_is_finite(gradients) and not all(g.isfinite().all() for g in gradients):
        _refuse("A gradient is not finite")


def sum_is_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Return a bool ``()``: if True each number is finite; if False one is not, or their sum overflows.

    It costs a sixth of asking each number.
    """
    # Row by row: the compiler's sum of a whole matrix is slow on several threads, and so is a stack of sums.
    rows = (tensor.sum(-1) if tensor.ndim > 1 else tensor for tensor in tensors)
    return reduce(torch.add, (each.sum() for each in rows)).isfinite()


def _refuse(what: str) -> NoReturn:
    error = FloatingPointError(what)
    error.add_note("Expected finite numbers: a step of pyro_vae.SVI names the site where they cease to be.")
    raise error
