"""Attributes: what modules hold besides parameters and buffers. A graph keeps their values of the capture."""

import argparse
import dataclasses
import types
import weakref
from collections.abc import Hashable
from typing import Any

import torch
from torch import nn

from pyro_vae.compiled.internals import (
    MODULE_HOOKS,
    check_hooks_are_seen,
    hooks_on_all_modules,
    hooks_on_module,
)
from pyro_vae.programs import Pair

# A Pair handles a module's parameters, buffers, children and modes. That leaves the hooks.
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))

_BY_VALUE = frozenset((int, float, bool, complex, str, bytes, type(None), torch.dtype, torch.device))
_LARGE = 100  # A larger container, such as a vocabulary, is described by its identity and length.

# Attributes that a run was seen to change: counters, kept results, caches. They are not inputs of a run.
_changed_by_runs: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()


def describe_attributes(pair: Pair) -> Hashable:
    """Describe what a run can read in the attributes of modules, and the hooks on them, as a cache key.

    Numbers and strings are described by value. Containers, dataclasses and namespaces are described by their
    contents. Everything else (a tensor, a function instead of ``forward``, a distribution, a hook) is
    described by identity. Attributes that a run changes are left out, once :func:`leave_out` knows them.
    """
    found: list[Any] = [describe(hooks) for hooks in hooks_on_all_modules()]
    for module in pair.modules:
        found += type(module), getattr(type(module), "forward", None)
        left_out = _changed_by_runs.get(module, ()) if _changed_by_runs else ()
        for name, value in vars(module).items():
            if (name not in _OF_EVERY_MODULE or (value and name in MODULE_HOOKS)) and name not in left_out:
                kind = type(value)
                found += (name, kind, value) if kind in _BY_VALUE else (name, describe(value))
    return tuple(found)


def read_attributes(pair: Pair) -> list[dict[str, Hashable]]:
    """Return the attributes of each module, described in the same way."""
    return [
        {name: describe(value) for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}
        for module in pair.modules
    ]


def leave_out(pair: Pair, before: list[dict[str, Hashable]]) -> None:
    """Leave out of later descriptions the attributes that differ from before, since runs changed them."""
    for module, then, now in zip(pair.modules, before, read_attributes(pair), strict=True):
        changed = {name for name in now if name not in then or then[name] != now[name]}
        if changed:
            _changed_by_runs.setdefault(module, set()).update(changed)


def check_hooks(pair: Pair) -> None:
    """Refuse hooks on modules, except those of ``torch.nn.utils``, which compute a weight.

    Raises:
        ValueError: naming the hook and its module.
    """
    check_hooks_are_seen()
    hooks = [("all modules", hook) for on_all in hooks_on_all_modules() for hook in on_all.values()]
    for module in pair.modules:
        hooks += [(type(module).__name__, hook) for hook in hooks_on_module(module)]
    for owner, hook in hooks:
        classes = type(hook).__mro__  # includes weight_norm, spectral_norm, prune
        if not any(each.__module__.startswith("torch.nn.utils.") for each in classes):
            raise ValueError(
                f"The hooks on {owner}: expected none in a graph, got {getattr(hook, '__qualname__', hook)}, "
                "which would run while the graph is captured and never again. To fix: remove it, write what "
                "it computes into forward, or do without compiling."
            )


def identity(value: Any) -> Hashable:
    """Describe an object by its identity, or by its value if it cannot be referenced weakly."""
    try:
        hash(value)
    except TypeError:
        return id(value)
    try:
        # A later object at this address has another reference.
        return id(value), weakref.ref(value), getattr(value, "requires_grad", False)
    except TypeError:
        return type(value), value


def describe(value: Any) -> Hashable:
    """Describe what an attribute holds, as in :func:`describe_attributes`."""
    kind = type(value)
    if kind in _BY_VALUE:
        return kind, value
    if isinstance(value, (list, tuple, dict)):
        if len(value) > _LARGE:
            return id(value), len(value)
        return kind, *map(describe, value.items() if isinstance(value, dict) else value)
    if dataclasses.is_dataclass(value) or isinstance(value, argparse.Namespace | types.SimpleNamespace):
        return kind, describe(getattr(value, "__dict__", None) or id(value))
    return identity(value)
