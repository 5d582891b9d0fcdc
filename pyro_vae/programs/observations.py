"""Observations: observed values that do not fit their distribution, and numbers that are not finite."""

import math
import warnings
from collections.abc import Iterable, Sequence
from functools import reduce
from typing import Any, NoReturn

import torch
from pyro.distributions import MaskedDistribution
from pyro.distributions.torch_distribution import ExpandedDistribution
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import Independent, constraints

from pyro_vae.arguments import check_tensor
from pyro_vae.programs.traces import Site, family, innermost, observed_sites

_TO_FLOAT = {
    torch.uint8: "convert 8-bit images with x.float() / 255.",
    torch.bool: "convert binary images with x.float().",
}


def check_observed(trace: Trace) -> None:
    """Refuse observed values that do not have the form of a draw, or are outside the support.

    Raises:
        ValueError: naming the site, what was expected, what was given and how to fix it.
    """
    for name, site in observed_sites(trace).items():
        if isinstance(site["value"], Tensor):
            value = site["value"]
            if value.layout != torch.strided or value.is_complex():
                check_tensor(_subject(name, site["fn"]), value)
            _check_form(name, site)
            check_values(name, site)
            _warn_of_grey_levels(name, site)


def _check_form(name: str, site: Site) -> None:
    """Refuse an observed value that differs from a draw in dtype or shape."""
    fn, value = site["fn"], site["value"]
    try:
        expected, shape = fn.sample().dtype, fn.shape()
    except (NotImplementedError, AssertionError):
        return  # a likelihood that cannot be sampled, or one as long as its observation
    if expected.is_floating_point:
        if value.dtype in _TO_FLOAT:
            raise ValueError(
                f"{_subject(name, fn)}: expected {expected}, got {value.dtype}. To fix: "
                f"{_TO_FLOAT[value.dtype]}"
            )
        if value.dtype == torch.float64 != expected:
            raise ValueError(
                f"{_subject(name, fn)}: expected {expected}, got torch.float64. To fix: convert the batch "
                "with x.float(), or model and guide with .double()."
            )
    if value.shape != shape:
        fix = "give flat data, x.flatten(1), or x.flatten().unsqueeze(0) for a single one, and"
        if value.dim() == len(shape) and value.numel() != fn.event_shape.numel():
            fix = "bring the data to this shape, or use"
        raise ValueError(
            f"{_subject(name, fn)}: expected shape {tuple(shape)}, batch then event, without broadcasting, "
            f"got {tuple(value.shape)}. To fix: {fix} a decoder that is as wide."
        )


def check_values(name: str, site: Site) -> None:
    """Refuse observed values that are not finite or outside the support of their distribution.

    Raises:
        ValueError: like :func:`check_observed`.
    """
    fn, value = site["fn"], site["value"]
    missing = value.isnan()
    if value.isinf().any() or (missing.any() and not _takes_nan(fn, value)):
        fix = (
            "where NaN marks a missing value, take the pair pyro_vae.mask_missing(model, guide); or observe "
            "x.nan_to_num() under a mask that leaves it out, such as "
            "dist.Normal(...).mask(~x.isnan()).to_event(1), so that what is filled in does not count."
        )
        if not is_product(fn):
            fix = (
                "where NaN marks a missing value, observe a product over single entries, such as "
                "dist.Normal(...).to_event(1), in the pair pyro_vae.mask_missing(model, guide); or a "
                "distribution that takes NaN, such as dist.NanMaskedMultivariateNormal."
            )
        raise ValueError(
            f"{_subject(name, fn)}: expected finite values, also under a mask, got NaN or infinity in "
            f"{_count(~value.isfinite())}. To fix: {fix if missing.any() else 'leave infinite values out.'}"
        )
    support = _support(fn)
    if support is None:
        return
    inside = support.check(value)
    while missing.dim() > inside.dim():  # a support of vectors
        missing = missing.any(-1)
    inside = inside | missing
    if not inside.all():
        outside = value[~inside].flatten()
        raise ValueError(
            f"{_subject(name, fn)}: expected {_describe(support)}, got values outside its support in "
            f"{_count(~inside)}, for example {outside[0].item():.4g}. To fix: {_fix(support, value)}"
        )


def _warn_of_grey_levels(name: str, site: Site) -> None:
    """Warn of images that nobody has divided by 255, where the likelihood takes any number."""
    fn, value = site["fn"], site["value"]
    # So many whole numbers up to 128 or more are an image. Rows of ages or counts seldom look like this.
    looks_grey = fn.event_shape.numel() >= 64 and _is_8_bit(value) and value.max() >= 128
    if looks_grey and _support(fn) is constraints.real:
        warnings.warn(
            f"{_subject(name, fn)}: got whole numbers from 0 to {value.max():.0f}, which look like 8-bit "
            "grey levels. Networks do not train well on numbers of this size. To fix: divide by 255.",
            stacklevel=2,
        )


def _support(fn: Any) -> Any:
    """Return the support of a single number of a distribution; None if it is not known."""
    try:
        support = fn.support
    except NotImplementedError:
        return None
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


def is_product(fn: Any) -> bool:
    """Return whether a distribution is a product over single numbers, its entries."""
    while isinstance(fn, Independent | MaskedDistribution | ExpandedDistribution):
        fn = fn.base_dist
    return bool(fn.event_dim == 0)


def _takes_nan(fn: Any, value: Tensor) -> bool:
    """Return whether a distribution gives NaN a density, as it does if NaN means missing."""
    # A mask only hides NaN: the gradient is still NaN.
    while isinstance(fn, Independent | MaskedDistribution):
        fn = fn.base_dist
    try:
        # If it is not finite without NaN either, the reason is another one.
        return bool(
            fn.log_prob(value).isfinite().all() or not fn.log_prob(value.nan_to_num()).isfinite().all()
        )
    except ValueError:  # from torch's validation
        return False


def holds_nan(values: Iterable[Any]) -> bool:
    """Return whether a tensor among values holds NaN."""
    return any(isinstance(value, Tensor) and bool(value.isnan().any()) for value in values)


def without_nan(value: Any) -> Any:
    """Return a value with zeros for NaN, if it is a tensor."""
    return value.nan_to_num() if isinstance(value, Tensor) else value


def nan_is_read(program: str, values: Iterable[Any]) -> str:
    """Return the message about a model or a guide that computes with NaN in the values of the batch."""
    counts = ", ".join(_count(v.isnan()) for v in values if isinstance(v, Tensor) and v.isnan().any())
    return (
        f"The {program}: expected its networks to read numbers, got NaN in {counts} of the batch. To fix: "
        "where NaN marks missing values, give the networks x.nan_to_num(), and beside it x.isnan(); for the "
        "guide, pyro_vae.mask_missing(model, guide) does so."
    )


def _subject(name: str, fn: Any) -> str:
    return f"Site '{name}' of the model, {family(fn)}"


def _fix(support: Any, value: Tensor) -> str:
    """Say what to do about values outside a support, for data of that kind."""
    if not _is_of_pixels(support):
        return _fix_of_other_data(support)
    if _is_8_bit(value):
        return "divide by 255, since these look like 8-bit grey levels."
    if support is constraints.boolean and value.min() >= 0 and value.max() <= 1:
        return (
            "binarise grey pixels with pyro_vae.data.DynamicBinarisation(), or observe them under "
            "ContinuousBernoulli() or Categorical(levels)."
        )
    return "make pixels floats in [0, 1], and K grey levels k / (K - 1)."


def _is_of_pixels(support: Any) -> bool:
    """Return whether a support is {0, 1}, [0, 1], or a grid of grey levels of this package."""
    if support is constraints.boolean or type(support).__module__.startswith("pyro_vae."):
        return True
    ends = getattr(support, "lower_bound", None), getattr(support, "upper_bound", None)
    if support.is_discrete or None in ends:
        return False
    return all(bool((torch.as_tensor(end) == i).all()) for i, end in enumerate(ends))


def _fix_of_other_data(support: Any) -> str:
    if not support.is_discrete:
        return "bring the data into the support, or observe them under another distribution."
    upper = getattr(support, "upper_bound", None)
    if upper is None:
        return (
            "give counts as they are, whole numbers of 0 or more; observe normalised or log-transformed ones "
            "under a Gaussian."
        )
    return (
        f"give whole numbers from 0 to {int(torch.as_tensor(upper).max())}; leave padding (such as -100) out "
        "by a mask, dist.Categorical(...).mask(x >= 0), observed at x.clamp(min=0)."
    )


def _is_8_bit(value: Tensor) -> bool:
    whole = value.is_floating_point() and bool((value == value.round()).all())
    return whole and bool(value.min() >= 0) and bool(1 < value.max() <= 255)


def _describe(support: Any) -> str:
    if support is constraints.boolean:
        return "0 or 1"
    return str(support).removesuffix("()")


def _count(wrong: Tensor) -> str:
    return f"{int(wrong.sum()):,} of {wrong.numel():,} values"


def fault_at(site: Site) -> str:
    """Return what is wrong with the numbers of a site (distribution, value or density), or ""."""
    inner = innermost(site["fn"])
    for name in getattr(inner, "arg_constraints", {}):
        parameter = inner.__dict__.get(name)
        if isinstance(parameter, Tensor):
            if not parameter.isfinite().all():
                return f"NaN or infinity in its {name}"
            constraint = inner.arg_constraints[name]
            # A point accepts what its site accepts, and the point does not know that.
            if not constraints.is_dependent(constraint) and not constraint.check(parameter).all():
                return f"a {name} outside {_describe(constraint)}"
    if not site["is_observed"] and isinstance(site["value"], Tensor) and not site["value"].isfinite().all():
        return "a sampled value that is NaN or infinite"
    if not site["log_prob"].isfinite().all():
        return "a log probability that is NaN or infinite"
    return ""


def check_finite(loss: float | Tensor, gradients: Sequence[Tensor] = ()) -> None:
    """Refuse a loss or gradients that are not finite.

    Raises:
        FloatingPointError: naming which.
    """
    if not math.isfinite(loss):
        _refuse(f"The loss is {float(loss)}")
    # A sum of finite numbers may overflow: then check each number.
    if gradients and not sum_is_finite(gradients) and not all(g.isfinite().all() for g in gradients):
        _refuse("A gradient is not finite")


def sum_is_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Return a bool ``()``: True if every number is finite, False if one is not or their sum overflows.

    It costs a sixth of a check of each number.
    """
    # Row by row: compiled, a sum of a whole matrix is slow on several threads, and so is a stack of sums.
    rows = (tensor.sum(-1) if tensor.ndim > 1 else tensor for tensor in tensors)
    return reduce(torch.add, (each.sum() for each in rows)).isfinite()


def _refuse(what: str) -> NoReturn:
    error = FloatingPointError(what)
    error.add_note(
        "To fix: take the step with pyro_vae.SVI, which names the site where numbers stop being finite."
    )
    raise error
