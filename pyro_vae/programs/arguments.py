"""Arguments: batches that a model and a guide cannot take, refused in the terms of whoever made them."""

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae.programs.pair import Pair, Program


def check_not_empty(pair: Pair) -> None:
    """Refuse a batch without data.

    Raises:
        ValueError: with the shape of the first tensor.
    """
    batch = next((value for value in pair.args if isinstance(value, Tensor) and value.dim()), None)
    if batch is not None and not batch.numel():
        raise ValueError(
            "The batch: expected at least one data point, got an empty tensor of shape "
            f"{tuple(batch.shape)}. To fix: leave empty batches out."
        )


@contextmanager
def naming_the_batch(program: str, pair: Pair) -> Iterator[None]:
    """Turn the errors of a program that cannot take its arguments into a ValueError that names them.

    Args:
        program: "model" or "guide".
        pair: the pair on its batch.
    """
    try:
        yield
    except (RuntimeError, TypeError, IndexError, NotImplementedError, AttributeError, ValueError) as error:
        _explain(program, pair, error)
        message, dump, _ = str(error).partition("Trace Shapes:")  # which Pyro puts behind every error
        message = message.rstrip()
        if isinstance(error, ValueError) and dump:
            raise ValueError(message) from error
        if isinstance(error, (AttributeError, ValueError)):
            raise
        given = ", ".join(
            f"{tuple(value.shape)} {value.dtype}"
            for value in [*pair.args, *pair.kwargs.values()]
            if isinstance(value, Tensor)
        )
        raise ValueError(
            f"The {program}: expected a batch as its networks were built for, floats of shape (batch, "
            f"width), got {given or 'no tensor'}, on which it cannot run: {message}. To fix: change the "
            "batch or the networks."
        ) from error


def _explain(side: str, pair: Pair, error: Exception) -> None:
    """Raise a ValueError if a common mistake about the batch explains why a program fails."""
    values = [*pair.args, *pair.kwargs.values()]
    check_no_arrays(values)
    program = pair.guide if side == "guide" else pair.model
    taken = _parameters_of(program)
    if len(values) == 1 and isinstance(values[0], list | tuple):
        raise ValueError(
            f"The batch: expected its parts as arguments, got one {type(values[0]).__name__} of "
            f"{len(values[0])}. To fix: svi.step(*batch)."
        ) from error
    if taken is not None and len(pair.args) > len(taken):
        raise ValueError(
            f"The batch: it has {len(pair.args)} parts, and the {side} takes {len(taken)} "
            f"({', '.join(taken)}). To fix: drop the others (for x, _ in loader, if they are labels), or let "
            "model and guide both take them."
        ) from error
    if "'Tensor' object is not callable" in str(error):
        raise ValueError(no_family(side)) from error
    reduced = {p.dtype for p in pair.parameters} & {torch.float16, torch.bfloat16}
    if reduced and "dtype" in str(error):
        raise ValueError(
            f"The {side}: expected parameters of the dtype of the batch, got {reduced.pop()}. To fix: keep "
            "model and guide in float32, and take the steps inside torch.autocast(device, torch.bfloat16)."
        ) from error
    if "more than 1 value per channel" in str(error):
        raise ValueError(
            f"The batch: expected two or more data points, since the {side} has BatchNorm in training mode, "
            "got one. To fix: leave a last batch of one out (drop_last=True)."
        ) from error


def no_family(side: str) -> str:
    """Return the message about a program that samples from a tensor."""
    return (
        f"The {side}: expected pyro.sample to get a distribution, got a tensor: does a network end without a "
        "family? To fix: nn.Sequential(network, pv.Bernoulli()) for a decoder, pv.DiagNormal() for an "
        "encoder."
    )


def check_no_arrays(values: Iterable[Any]) -> None:
    """Refuse arrays of NumPy and tables of pandas.

    Raises:
        ValueError: naming the first one, with the line that converts it.
    """
    for value in values:
        package = type(value).__module__.partition(".")[0]
        if package in ("numpy", "pandas"):
            tensor = "torch.from_numpy(x)" if package == "numpy" else "torch.from_numpy(x.to_numpy())"
            raise ValueError(
                f"The batch: expected tensors, got {package}.{type(value).__name__}. To fix: "
                f"{tensor}.float()."
            )


def _parameters_of(program: Program) -> list[str] | None:
    """Return the names of the positional arguments that a program takes; None if it takes any number."""
    function: Any = program.forward if isinstance(program, nn.Module) else program
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return None
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
