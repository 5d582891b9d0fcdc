"""Batches that a model and a guide cannot take, refused with a message in the user's terms."""

import inspect
import re
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pyro_vae.arguments import check_tensor, require, to_tensor
from pyro_vae.programs.missing import LostNaNError
from pyro_vae.programs.pair import Pair, Program, leaves, no_guide
from pyro_vae.programs.traces import latent_sites, observed_sites


def check_not_empty(pair: Pair) -> None:
    """Refuse a batch without data.

    Raises:
        ValueError: with the shape of the first tensor.
    """
    batch = next((value for value in pair.args if isinstance(value, Tensor) and value.dim()), None)
    first = pair.args[0] if pair.args else None
    empty = None
    if batch is not None and not batch.numel():
        empty = f"tensor of shape {tuple(batch.shape)}"
    elif isinstance(first, Sized) and not isinstance(first, Tensor) and not len(first):
        empty = type(first).__name__
    if empty:
        raise ValueError(
            f"The batch: expected at least one data point, got an empty {empty}. To fix: leave empty batches "
            "out."
        )
    for value in pair.args:
        if isinstance(value, Tensor) and (value.is_meta or value.is_quantized):
            check_tensor("The batch", value)


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
        if is_out_of_memory(error):
            raise
        _explain(program, pair, error)
        message, dump, _ = str(error).partition("Trace Shapes:")  # Pyro appends these to every error
        message = message.rstrip()
        if isinstance(error, LostNaNError):
            raise LostNaNError(message) from error
        if explained := _explain_statement(program, message):
            raise ValueError(explained) from error
        if isinstance(error, ValueError) and dump:
            raise ValueError(message) from error
        tensors = [value for value in leaves((pair.args, pair.kwargs)) if isinstance(value, Tensor)]
        if isinstance(error, ValueError) or (isinstance(error, AttributeError) and tensors):
            raise  # the program's own
        given = ", ".join(
            f"{tuple(value.shape)} {value.dtype}"
            for value in [*pair.args, *pair.kwargs.values()]
            if isinstance(value, Tensor)
        )
        raise ValueError(
            f"The {program}: expected a batch that fits its networks, floats of shape (batch, "
            f"width), got {given or 'no tensor'}, on which it cannot run: {message}. To fix: change the "
            "batch or the networks."
        ) from error


def is_out_of_memory(error: Exception) -> bool:
    """Return whether torch could not allocate a tensor: then the batch's form is not the reason."""
    return isinstance(error, torch.OutOfMemoryError) or "alloc" in str(error)


def _explain(side: str, pair: Pair, error: Exception) -> None:
    """Raise a ValueError if a common mistake about the batch explains why a program fails."""
    if fault := parameter_fault(pair):
        raise ValueError(f"The {side}: expected finite parameters, got {fault}") from error
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
            f"The batch: expected {len(taken)} parts, as the {side} takes ({', '.join(taken)}), got "
            f"{len(pair.args)}. To fix: drop the others (for x, _ in loader, if they are labels), or let "
            "model and guide both take them."
        ) from error
    if taken is not None and len(pair.args) < len(taken) and "required positional argument" in str(error):
        raise ValueError(
            f"The batch: expected {len(taken)} parts, as the {side} takes ({', '.join(taken)}), got "
            f"{len(pair.args)}. To fix: give all of them; to fit's watch and to an evaluation, as one tuple."
        ) from error
    if "'Tensor' object is not callable" in str(error) or "no attribute 'batch_shape'" in str(error):
        raise ValueError(no_family(side)) from error
    reduced = {p.dtype for p in pair.parameters} & {torch.float16, torch.bfloat16}
    if reduced and "dtype" in str(error):
        raise ValueError(
            f"The {side}: expected parameters of the dtype of the batch, got {reduced.pop()}. To fix: keep "
            "model and guide in float32, and take the steps inside torch.autocast(device, torch.bfloat16)."
        ) from error
    wide = {p.dtype for p in pair.parameters} == {torch.float64}
    if wide and any(isinstance(value, Tensor) and value.dtype == torch.float32 for value in values):
        raise ValueError(
            f"The {side}: expected a batch of the dtype of its parameters, torch.float64, got torch.float32. "
            "To fix: convert the batch with x.double(), or model and guide with .float()."
        ) from error
    if "more than 1 value per channel" in str(error):
        raise ValueError(
            f"The batch: expected two or more data points, since the {side} has BatchNorm in training mode, "
            "got one. To fix: leave a last batch of one out (drop_last=True)."
        ) from error


# The fix for the scale of a posterior that collapses or explodes.
BOUND_THE_SCALE = "scale the encoder's input (log1p for counts), bound the scale (DiagNormal(bounds=(-6, 2)))"

# Pyro's and torch's messages; torch's continues with all values.
_PLATE_MISMATCH = re.compile(r"Shape mismatch inside plate\('(.+)'\) at site (\S+) dim -\d+, (\d+) vs (\d+)")
_OUTSIDE_CONSTRAINT = re.compile(
    r"Expected parameter (\w+) \(\w+ of shape (.+?)\) of distribution (\w+)\(.* to satisfy the constraint "
    r"(.+?), but found invalid values",
    re.DOTALL,
)


def _explain_statement(side: str, message: str) -> str:
    """Return our message about a statement that Pyro or torch refuses; "" if it is another statement."""
    if found := _PLATE_MISMATCH.search(message):
        plate, site, size, given = found.groups()
        return (
            f"Site '{site}' of the {side}: expected batch dimensions for its plates alone, got one of size "
            f"{given} in the place of the plate '{plate}' of size {size}. To fix: end the distribution in "
            ".to_event(1), if its last dimension is one event; else make the plate as long as the data."
        )
    if found := _OUTSIDE_CONSTRAINT.search(message):
        parameter, shape, family, constraint = found.groups()
        other = "other values, such as 0 or NaN"
        fix = (
            "map the output of the network there, such as a log sigma by exp; look for NaN in the batch; "
            "lower the learning rate, if it trained before."
        )
        if constraint.startswith(("Real()", "IndependentConstraint(Real()")):
            other = "NaN"
            fix = (
                "look for NaN or very large numbers in the batch (divide 8-bit grey levels by 255); lower "
                "the learning rate, if it trained before."
            )
        if side == "guide" and parameter == "scale":
            fix = BOUND_THE_SCALE + ", lower the learning rate, or look for NaN in the batch."
        return (
            f"The {side}: expected the {parameter} of its {family}, of shape {shape}, in {constraint}, got "
            f"{other}. To fix: {fix}"
        )
    return ""


def parameter_fault(pair: Pair) -> str:
    """Return which parameter of a pair is not finite, and what to do; "" if all are finite."""
    for name, parameter in (named for root in pair.roots for named in root.named_parameters()):
        if not is_lazy(parameter) and not parameter.isfinite().all():
            return f"NaN or infinity in '{name}'. To fix: start again from finite ones, such as a checkpoint."
    return ""


def check_widths(pair: Pair, model_trace: poutine.Trace, guide_trace: poutine.Trace) -> None:
    """Refuse a network that is too narrow or too wide for the family behind it.

    Raises:
        ValueError: with the width that the family needs for this data or this latent.
    """
    for name, site in observed_sites(model_trace).items():
        if isinstance(site["value"], Tensor):
            _check_width("model", name, pair.model, site["fn"].shape(), site["value"].shape)
    prior = latent_sites(model_trace)
    for name, site in latent_sites(guide_trace).items():
        if name in prior:
            _check_width("guide", name, pair.guide, site["fn"].shape(), prior[name]["fn"].shape())


def _check_width(side: str, name: str, program: Program, given: torch.Size, expected: torch.Size) -> None:
    if len(given) != 2 or given[:1] != expected[:-1] or given == expected:
        return  # not only a problem of the width
    families: list[Any] = [
        module
        for module in Pair(program, no_guide).modules
        if callable(getattr(module, "num_features", None))  # of BatchNorm, it is a number
    ]
    if len(families) == 1:
        raise ValueError(
            f"Site '{name}' of the {side}: expected an event of {expected[1]} dimensions, as in the "
            f"{'data' if side == 'model' else 'model'}, got {given[1]}. To fix: end the network before "
            f"{type(families[0]).__name__} in {families[0].num_features(expected[1])} features."
        )


def no_family(side: str) -> str:
    """Return the message about a program that samples from a tensor."""
    return (
        f"The {side}: expected pyro.sample to get a distribution, got something else, such as a tensor: does "
        "a network end without a family? To fix: nn.Sequential(network, pv.Bernoulli()) for a decoder, "
        "pv.DiagNormal() for an encoder."
    )


def check_no_arrays(values: Iterable[Any]) -> None:
    """Refuse arrays of NumPy and tables of pandas.

    Raises:
        ValueError: naming the first one, with the line that converts it.
    """
    for value in values:
        package = type(value).__module__.partition(".")[0]
        require(
            package not in ("numpy", "pandas"),
            "The batch",
            "tensors",
            f"{package}.{type(value).__name__}",
            to_tensor(value),
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
