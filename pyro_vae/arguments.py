"""Arguments that a function cannot take, refused with a message in the caller's terms."""

import math
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution


def require(condition: bool, subject: str, expected: object, got: object, to_fix: str) -> None:
    """Raise a ValueError in the form of all errors of the package, unless the condition holds."""
    if not condition:
        raise ValueError(f"{subject}: expected {expected}, got {got}. To fix: {to_fix}.")


def given(value: Any) -> str:
    """Return a short text for a value: its Python form if it is plain, else the name of its type."""
    if value is None or isinstance(value, bool | int | float | str | list | tuple | dict):
        written = repr(value)
        if len(written) <= 60:
            return written
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"the class {value.__name__}" if isinstance(value, type) else _type(value)


def is_whole(value: Any, least: int = 0) -> bool:
    """Return whether a value is a whole number, not a bool, and large enough."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def is_finite(value: Any) -> bool:
    """Return whether a value is a finite number, not a bool."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:  # an integer beyond all floats
        return False


def whole_number(subject: str, value: Any, least: int, to_fix: str) -> int:
    """Return a whole number, also one of NumPy, as a Python number.

    Raises:
        ValueError: if it is not a whole number, or too small.
    """
    expected = "a positive whole number" if least == 1 else f"a whole number of at least {least}"
    require(is_whole(value, least), subject, expected, given(value), to_fix)
    return int(value)


def finite_number(subject: str, value: Any, to_fix: str) -> float:
    """Return a finite number as a Python number.

    Raises:
        ValueError: if it is not a finite number.
    """
    require(is_finite(value), subject, "a finite number", given(value), to_fix)
    return float(value)


def as_seed(subject: str, value: Any) -> int:
    """Return a seed for torch's generators.

    Raises:
        ValueError: if it is not a whole number from 0 to 2^63 - 1.
    """
    valid = is_whole(value) and value < 2**63
    require(valid, subject, "a whole number from 0 to 2^63 - 1", given(value), "pass a number such as 0")
    return int(value)


def check_flag(subject: str, value: Any) -> None:
    """Refuse anything but True and False."""
    require(isinstance(value, bool), subject, "True or False", given(value), "pass one of them")


def check_callable(subject: str, value: Any, to_fix: str) -> None:
    """Refuse anything that cannot be called."""
    require(callable(value), subject, "a module or a function", given(value), to_fix)


def check_tensor(subject: str, value: Any) -> None:
    """Refuse anything but a dense tensor of real numbers."""
    name = subject.rpartition(" ")[2] if subject.isidentifier() or ", " in subject else "x"
    if not isinstance(value, Tensor):
        got = "None" if value is None else _type(value)
        require(False, subject, "a tensor", got, to_tensor(value, name))
    for odd, got, to_fix in (
        (value.is_nested, "a nested tensor", f"{name}.to_padded_tensor(0)"),
        (value.layout != torch.strided, f"a tensor of layout {value.layout}", f"{name}.to_dense()"),
        (value.is_meta, "a tensor on the meta device", "pass a tensor with values"),
        (value.is_quantized, f"a tensor of {value.dtype}", f"{name}.dequantize()"),
        (value.is_complex(), f"a tensor of {value.dtype}", f"{name}.abs() or {name}.real"),
    ):
        require(not odd, subject, "a dense tensor of real numbers", got, to_fix)


def _type(value: Any) -> str:
    kind = type(value)
    package = kind.__module__.partition(".")[0]
    return kind.__name__ if package == "builtins" else f"{package}.{kind.__name__}"


def to_tensor(value: Any, name: str = "x") -> str:
    """Return the line that makes a tensor of a value."""
    package = type(value).__module__.partition(".")[0]
    if isinstance(value, Distribution):
        return f"pass its mean, {name}.mean"
    if package in ("numpy", "pandas"):
        return f"torch.from_numpy({name}{'.to_numpy()' if package == 'pandas' else ''}).float()"
    if isinstance(value, list | tuple) and value:
        if all(isinstance(part, Tensor) for part in value):
            return f"torch.stack({name})"
        if all(type(part).__module__ == "numpy" for part in value):
            return f"torch.from_numpy(numpy.stack({name})).float()"
        return f"torch.tensor({name})"
    return "pass a tensor"
