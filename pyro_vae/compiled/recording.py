"""Recording: how to keep a run of a pair from reading values, so that it can be recorded as a graph."""

import gc
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pyro
import torch
from pyro.ops.provenance import detach_provenance
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_vae.compiled.internals import hooks_on_parameter, reading_nothing
from pyro_vae.programs.dependencies import WRITES
from pyro_vae.programs.one_thread import one_thread
from pyro_vae.programs.pair import map_leaves


class KeepTensors(TorchFunctionMode):
    """Make ``tensor.item()`` return a tensor, since Pyro's ELBOs call it on their loss; refuse other reads.

    A read cannot be recorded: a graph would keep the numbers of the first batch.
    """

    def __torch_function__(
        self,
        function: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if function is Tensor.item:
            # TraceGraph_ELBO wraps tensors to track them; a graph would freeze a wrapped tensor.
            return detach_provenance(args[0]).detach()
        if function in (Tensor.numpy, Tensor.tolist, Tensor.__array__):
            raise RuntimeError(f"{function.__name__} reads a tensor into Python")
        if function in (Tensor.__float__, Tensor.__int__, Tensor.__bool__, Tensor.__index__):
            # make_fx allows the read of a buffer itself, but not that of a result.
            return function(args[0].detach())
        # It also allows the read of a buffer that is the size of a result, or an index.
        written = 1 if WRITES.fullmatch(getattr(function, "__name__", "")) else 0
        others, named = map_leaves(_detach_whole_number, (args[written:], kwargs or {}))
        return function(*args[:written], *others, **named)


def _detach_whole_number(value: Any) -> Any:
    """Detach a single whole number, also in a slice; return everything else unchanged."""
    if isinstance(value, slice):
        return slice(*map(_detach_whole_number, (value.start, value.stop, value.step)))
    is_read = isinstance(value, Tensor) and value.numel() == 1 and not value.is_floating_point()
    return value.detach() if is_read else value


@contextmanager
def no_hooks(parameters: list[Tensor]) -> Iterator[None]:
    """Keep hooks on parameters from running now: they run on the gradients that a graph returns."""
    registered = [hooks for p in parameters for hooks in hooks_on_parameter(p)]
    kept = [hooks.copy() for hooks in registered]
    for hooks in registered:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, before in zip(registered, kept, strict=True):
            hooks.update(before)


@contextmanager
def no_collection() -> Iterator[None]:
    """Switch Python's garbage collector off during a capture, which makes many objects and no garbage.

    It would take up to half of the time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def no_value_checks() -> Iterator[None]:
    """Keep Pyro from reading tensors: switch off its validation, and its shortcuts and warnings by value.

    Also switch off autocast's cache of reduced parameters. Then the gradients of a parameter that is used
    twice are added before they are rounded.
    """
    with ExitStack() as stack:
        stack.enter_context(one_thread)
        stack.enter_context(pyro.validation_enabled(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # type: ignore[attr-defined]
        stack.enter_context(reading_nothing())
        stack.callback(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
        torch.set_autocast_cache_enabled(False)
        yield
