"""Data that a picture cannot show correctly, refused with a message in the caller's terms."""

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from pyro_vae.arguments import check_tensor, given, is_whole, require

# The most dots along the longer side of a mosaic. So it is also the largest number of images in a line.
DOTS = 1200
LARGEST = 1e100  # matplotlib overflows on numbers near the end of float64
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def is_real(value: Any) -> bool:
    """Return whether a value is a number that can be drawn, not a bool."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    try:
        return abs(float(value)) <= LARGEST
    except OverflowError:  # an integer beyond all floats
        return False


def is_ratio(value: Any) -> bool:
    """Return whether a value can be drawn on a logarithmic axis."""
    return is_real(value) and value > 0


def is_list(value: Any) -> bool:
    """Return whether a value is a list, a tuple or the like, not a text."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def check_count(name: str, value: Any, least: int, to_fix: str) -> None:
    """Refuse a number of images in a line that is not whole, too small, or more than a line has dots."""
    expected = f"a whole number, {least} to {DOTS}"
    require(is_whole(value, least) and value <= DOTS, name, expected, given(value), to_fix)


def check_dimensions(dimensions: Any) -> None:
    """Refuse anything but a list of dimensions of a latent."""
    to_fix = "dimensions=[0, 1]; of a tensor, take .tolist()"
    whole = is_list(dimensions) and all(is_whole(d) for d in dimensions)
    require(whole, "dimensions", "a list of whole numbers from 0", given(dimensions), to_fix)
    require(len(dimensions) > 0, "dimensions", "one or more", "none", "choose the active dimensions")


def check_floats(name: str, value: Any) -> None:
    """Refuse anything but a dense tensor of finite floats."""
    check_tensor(name, value)
    to_fix = f"{name}.float()" + (" / 255" if value.dtype == torch.uint8 else "")
    require(value.dtype in _FLOATS, name, "floats", value.dtype, to_fix)
    finite = bool(value.isfinite().all())
    require(finite, name, "finite values", "infinity or nan", "look for diverged training")


def matrix(name: str, x: Any, to_fix: str) -> Tensor:
    """Return finite x ``(N, D)`` as float32 or float64, on the CPU and outside any graph."""
    check_floats(name, x)
    filled = x.ndim == 2 and x.numel() > 0
    require(filled, name, "shape (N, D), N and D at least 1", (*x.shape,), to_fix)
    return x.detach().cpu().resolve_neg().to(torch.promote_types(x.dtype, torch.float32))


def check_records(name: str, records: Any, numbers: Sequence[str]) -> None:
    """Refuse anything but a list of the records of a comparison, dicts with these numbers or None."""
    to_fix = "pass the records of a comparison, compared.records"
    require(is_list(records), name, "a list of records", given(records), to_fix)
    require(len(records) > 0, name, "at least one", "none", to_fix)
    for record in records:
        require(isinstance(record, Mapping), name, "dicts", given(record), to_fix)
        missing = [key for key in ("estimator", "particles", "group", *numbers) if key not in record]
        require(not missing, name, f"dicts with {', '.join(missing)}", "one without", to_fix)
        for key in ("estimator", "group"):
            require(isinstance(record[key], str), f"{name}: {key}", "strings", given(record[key]), to_fix)
        count, expected = record["particles"], "positive whole numbers below 1e9"
        few = is_whole(count, 1) and count < 1e9
        require(few, f"{name}: particles", expected, given(count), to_fix)
        for key in numbers:
            value = record[key]
            infinite = isinstance(value, float) and not math.isfinite(value)
            number = value is None or infinite or is_real(value)
            require(number, f"{name}: {key}", "numbers or None", given(value), to_fix)
