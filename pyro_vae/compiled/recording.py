"""Recording: how a run of a pair is kept from reading values, so that a graph can be recorded of it."""

import gc
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pyro
import torch
from pyro.infer.util import Dice
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_vae.programs.one_thread import one_thread


class KeepTensors(TorchFunctionMode):
    """Make ``tensor.item()`` return a tensor, since Pyro's ELBOs call it on their loss; refuse other reads.

    Reads cannot be recorded: a graph would keep the numbers of the first batch.
    """

    def __torch_function__(
        self,
        function: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if function is Tensor.item:
            return args[0].detach()
        if function in (Tensor.numpy, Tensor.tolist, Tensor.__array__):
            raise RuntimeError(f"{function.__name__} reads a tensor into Python")
        if function in (Tensor.__float__, Tensor.__int__, Tensor.__bool__, Tensor.__index__):
            # The read of a buffer itself would be let through, that of a result is not.
            return function(args[0].detach())
        return function(*args, **(kwargs or {}))


@contextmanager
def no_hooks(parameters: list[Tensor]) -> Iterator[None]:
    """Keep hooks on parameters from running: they run on the gradients that a graph returns."""
    registered = [
        hooks for p in parameters for hooks in (p._backward_hooks, p._post_accumulate_grad_hooks) if hooks
    ]
    kept = [hooks.copy() for hooks in registered]
    for hooks in registered:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, before in zip(registered, kept, strict=True):
            hooks.update(before)


_expectation = Dice.compute_expectation


def _expectation_of_one_shape(*args: Any, **kwargs: Any) -> Any:
    """Take Pyro's expectation over enumerated sites, with zeros where it drops what has no probability."""
    with mock.patch.object(Tensor, "masked_select", lambda x, mask: torch.where(mask, x, 0).flatten()):
        return _expectation(*args, **kwargs)


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

    Also switch off autocast's cache of reduced parameters. A capture has none, so that the gradients of a
    parameter that is used twice are added before they are rounded.
    """
    with ExitStack() as stack:
        stack.enter_context(one_thread)
        stack.enter_context(pyro.validation_enabled(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # type: ignore[attr-defined]
        # Pyro asks this before it reads a tensor.
        stack.enter_context(mock.patch.object(torch._C, "_get_tracing_state", return_value=True))
        for name, module in list(sys.modules.items()):
            if name.startswith("pyro.infer") and hasattr(module, "warn_if_nan"):
                stack.enter_context(mock.patch.object(module, "warn_if_nan", lambda value, *_, **__: value))
        stack.enter_context(mock.patch.object(Dice, "compute_expectation", _expectation_of_one_shape))
        stack.callback(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
        torch.set_autocast_cache_enabled(False)
        yield


@contextmanager
def no_kept_sources() -> Iterator[None]:
    """Drop the source code of the graphs that are made meanwhile.

    torch.fx keeps it for tracebacks, for as long as the process lives: some 50 kB for each capture.
    """
    sources = getattr(getattr(torch.fx.graph_module, "_loader", None), "eval_cache", {})
    before = set(sources)
    try:
        yield
    finally:
        for key in sources.keys() - before:
            del sources[key]
