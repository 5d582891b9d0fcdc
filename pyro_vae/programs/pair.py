"""Pair: a model and its guide on one batch, as one object to run."""

import functools
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from types import FunctionType
from typing import Any, NamedTuple, cast

import pyro
import torch
from pyro import poutine
from pyro.nn import PyroModule
from pyro.params.param_store import ParamStoreDict
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_vae.arguments import check_callable
from pyro_vae.programs.one_thread import one_thread
from pyro_vae.programs.snapshot import Buffer, Snapshot
from pyro_vae.programs.traces import latent_sites, map_draw, sample_sites

Program = Callable[..., Any]
Batch = Tensor | tuple[Any, ...] | list[Any]


def parameters(model: Program, guide: Program) -> list[nn.Parameter]:
    """Return the trainable parameters of a model and a guide; a shared one appears once.

    Pass them to a torch optimiser: ``torch.optim.Adam(parameters(model, guide), lr=1e-3)``.
    """
    return Pair(model, guide).trainable


def as_args(batch: Batch) -> tuple[Any, ...]:
    """Return a batch as the arguments of model and guide.

    Raises:
        ValueError: if the batch is a dictionary or a string, which has no order of arguments.
    """
    if isinstance(batch, dict | str):
        raise ValueError(
            "batch: expected a tensor, or a tuple or list of the arguments of model and guide, got "
            f"{type(batch).__name__}. To fix: pass its values as a tuple, in the order of the arguments."
        )
    return tuple(batch) if isinstance(batch, tuple | list) else (batch,)


def no_guide(*args: Any, **kwargs: Any) -> None:
    """Draw nothing: the guide of a model that runs alone."""


class Traces(NamedTuple):
    """One run of a pair: the trace of the model on the draws of the guide, and the trace of the guide."""

    model: poutine.Trace
    guide: poutine.Trace

    def are_empty(self) -> bool:
        """Return whether no program made a sample statement, as if the loss has no term for the batch."""
        return not any(True for trace in self for _ in sample_sites(trace))


class Pair:
    """A model and its guide on one batch, as one object to run.

    Make a new one for every call. It reads the modules when it is made. Later it would not notice that one of
    them was frozen or replaced.

    Args:
        model: a Pyro model: a module, a method of one, or either of them inside a Pyro handler.
        guide: a Pyro guide, in the same form; :func:`no_guide` if the model runs alone.
        args: the batch: the positional arguments of both programs.
        kwargs: the keyword arguments of both programs.

    Attributes:
        roots: the modules behind the programs.
        modules: the roots and the modules inside them, each once, in torch's order.
        parameters: their parameters, also frozen ones. A parameter that two modules share is in it twice.
        buffers: their buffers, each with its module and its name.
        trainable: the parameters that are not frozen, each once.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> None:
        for side, program in (("model", model), ("guide", guide)):
            if not callable(program):
                check_callable(side, program, "pass a module that makes Pyro statements, or a method of one")
        self.model, self.guide = model, guide
        self.args, self.kwargs = args, kwargs or {}
        self.roots = _roots(model, guide)
        self.parameters: list[nn.Parameter] = []
        self.buffers: list[Buffer] = []
        self._structure: list[Hashable] = []
        found: dict[nn.Module, None] = {}

        # Every step makes a pair, so one walk finds everything, without the names that torch would make.
        def visit(module: nn.Module) -> None:
            if module in found:
                return
            found[module] = None
            self._structure.extend((weakref.ref(module), module.training))
            for p in module._parameters.values():
                if p is not None:
                    self.parameters.append(p)
                    self._structure.extend((id(p), p.requires_grad, p.dtype, _strides(p)))
            self._structure.append(None)
            for name, buffer in module._buffers.items():
                self.buffers.append((module, name, buffer))
            for child in module._modules.values():
                if child is not None:
                    visit(child)

        for root in self.roots:
            visit(root)
        self.modules = list(found)
        self.trainable = list({id(p): p for p in self.parameters if p.requires_grad}.values())

    def wrapped(self, *, model: Program | None = None, guide: Program | None = None) -> "Pair":
        """Return the pair with a program inside handlers. Its modules stay the same."""
        pair = object.__new__(Pair)
        vars(pair).update(vars(self), model=model or self.model, guide=guide or self.guide)
        return pair

    def on(self, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> "Pair":
        """Return the pair on another batch."""
        pair = self.wrapped()
        pair.args, pair.kwargs = args, kwargs or {}
        return pair

    def with_module_statements(self) -> "Pair":
        """Return the pair with a ``pyro.module`` statement for each plain nn.Module behind a program.

        Some of Pyro's ``loss_and_grads`` differentiate only where they see a parameter statement. A
        PyroModule makes them, an nn.Module does not.
        """
        return self.wrapped(
            model=_with_module_statements(self.model), guide=_with_module_statements(self.guide)
        )

    # Running it.

    def trace(self, *, copy_draws: bool = False) -> Traces:
        """Run the guide, then the model on its draws; return their traces with log probabilities.

        Args:
            copy_draws: give the model copies of the draws. Then a gradient through the model differs from one
                through the guide.
        """
        guide_trace = self.trace_guide()
        draws = guide_trace
        if copy_draws:
            draws = guide_trace.copy()
            for name, site in latent_sites(guide_trace).items():
                draws.nodes[name] = cast(Any, site | {"value": map_draw(Tensor.clone, site["value"])})
        model_trace = self.trace_model(draws)
        guide_trace.compute_score_parts()
        model_trace.compute_log_prob()
        return Traces(model_trace, guide_trace)

    def trace_guide(self) -> poutine.Trace:
        """Run the guide; return its trace, without log probabilities."""
        return poutine.trace(self.guide).get_trace(*self.args, **self.kwargs)

    def trace_model(self, draws: poutine.Trace | None = None) -> poutine.Trace:
        """Run the model on the draws of a trace, else on its prior; return its trace, without log_prob."""
        model = self.model if draws is None else poutine.replay(self.model, trace=draws)
        return poutine.trace(model).get_trace(*self.args, **self.kwargs)

    # Restoring its state.

    def snapshot(self) -> Snapshot:
        """Return the buffers, modes and random state as they are now."""
        return Snapshot(self.modules, self.buffers, {p.device for p in self.parameters if not p.is_cpu})

    @contextmanager
    def on_copied_buffers(self) -> Iterator[None]:
        """Run on copies of the buffers, so that an earlier run's data for its backward pass do not change."""
        before = [(module, module._buffers.copy()) for module in self.modules if module._buffers]
        copies = {id(b): b.clone() for _, buffers in before for b in buffers.values() if b is not None}
        try:
            for module, buffers in before:
                module._buffers.update((name, copies.get(id(b))) for name, b in buffers.items())
            yield
        finally:
            for module, buffers in before:
                module._buffers.update(buffers)

    @contextmanager
    def trial(self) -> Iterator[None]:
        """Run without gradients; restore buffers, modes and random state at the end."""
        with one_thread, torch.no_grad():
            before = self.snapshot()
            try:
                yield
            finally:
                before.restore()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Run in eval mode without gradients; restore buffers and modes, and after an error everything."""
        with one_thread, torch.no_grad():
            before = self.snapshot()
            try:
                for root in self.roots:
                    root.eval()
                yield
            except BaseException:
                before.restore()
                raise
            before.restore(random_state=False)

    @contextmanager
    def isolated(self, *, validate: bool) -> Iterator[None]:
        """Run on the parameters in the modules, not on those in Pyro's global store.

        An empty store takes each PyroParam and each ``pyro.module`` from its module, and is dropped at the
        end. So nothing leaks from one pair into the next.

        Args:
            validate: whether Pyro validates distributions and sites during this time.
        """
        with ExitStack() as stack:
            stack.enter_context(one_thread)
            torch.clear_autocast_cache()  # inside a long autocast it would hold parameters of an earlier step
            store = pyro.get_param_store()
            others = vars(store).copy()
            stack.callback(vars(store).update, others)
            stack.callback(
                store.get_state
            )  # drops weak references that would stop a module from being pickled
            vars(store).update(vars(ParamStoreDict()))
            stack.enter_context(pyro.validation_enabled(validate))
            if not all(p.requires_grad for p in self.parameters):
                # Pyro warns of every frozen parameter, which is frozen on purpose.
                stack.enter_context(warnings.catch_warnings())
                warnings.filterwarnings("ignore", ".*was not registered in the param store")
                stack.enter_context(_KeepFrozen())
            yield

    # Its key.

    def signature(self, *, exact: bool = False) -> Hashable:
        """Return the key under which a :class:`PairCache` keeps a result about this pair.

        It holds the modules with their modes, and the parameters: which ones, frozen or not, their dtype and
        memory layout. It also holds the arguments: a tensor by its shape, dtype and device, a float or an
        object without a hash by its type, and the rest by value.

        Args:
            exact: also include what a captured graph would freeze: buffers, the values of floats, objects
                without a hash, and whether a tensor among the arguments requires gradients.
        """
        structure = [*self._structure, *(getattr(p, "__func__", None) for p in (self.model, self.guide))]
        if exact:
            for _, _, buffer in self.buffers:
                structure += [id(buffer), None if buffer is None else _strides(buffer)]
        return tuple(structure), _describe((self.args, self.kwargs), exact=exact)


class _KeepFrozen(Messenger):
    """Keeps frozen parameters frozen, which a PyroModule's statement about them would unfreeze."""

    def _pyro_param(self, msg: Any) -> None:
        value = msg["args"][1] if len(msg["args"]) > 1 else None
        if isinstance(value, nn.Parameter) and not value.requires_grad:
            msg["value"], msg["done"] = value, True


def map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply a function to the contents of nested plain tuples, lists and dicts, in order."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_leaves(function, each) for each in value))
    if type(value) in (tuple, list) or hasattr(type(value), "n_fields"):  # the latter as of torch.max
        return type(value)([map_leaves(function, each) for each in value])
    if type(value) is dict:
        return {key: map_leaves(function, each) for key, each in value.items()}
    return function(value)


def copied(value: Any) -> Any:
    """Return nested plain tuples, lists and dicts with copies of the tensors in them."""
    return map_leaves(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, value)


def leaves(value: Any) -> list[Any]:
    """Return the contents of nested plain tuples, lists and dicts, in order."""
    found: list[Any] = []
    map_leaves(found.append, value)
    return found


def _roots(*programs: Program) -> list[nn.Module]:
    """Return the modules behind programs, each once.

    A program is a module, a method of one, or either of them inside a Pyro handler
    (``poutine.scale(model, ...)``), ``functools.partial`` or ``functools.wraps``.
    """
    found: dict[int, nn.Module] = {}
    for program in programs:
        if isinstance(program, nn.Module):
            found.setdefault(id(program), program)
        elif isinstance(program, functools.partial):
            inner = [program.func, *program.args, *program.keywords.values()]
            found.update((id(root), root) for root in _roots(*filter(callable, inner)))
        elif hasattr(program, "__wrapped__"):
            found.update((id(root), root) for root in _roots(program.__wrapped__))
        else:
            owner = getattr(program, "__self__", None)  # the object of a bound method
            if isinstance(owner, nn.Module):
                found.setdefault(id(owner), owner)
    return list(found.values())


def functions_around_modules(*programs: Program) -> list[FunctionType]:
    """Return the functions around modules among programs. Python copies and pickles them as themselves."""
    found: list[FunctionType] = []
    for program in programs:
        if isinstance(program, functools.partial):
            inner = [program.func, *program.args, *program.keywords.values()]
            found += functions_around_modules(*filter(callable, inner))
        elif isinstance(program, FunctionType) and _roots(program):
            found.append(program)
    return found


def _with_module_statements(program: Program) -> Program:
    plain = [root for root in _roots(program) if not isinstance(root, PyroModule)]

    @functools.wraps(program)
    def run(*args: Any, **kwargs: Any) -> Any:
        for number, root in enumerate(plain):
            pyro.module(f"_plain{number}", root)
        return program(*args, **kwargs)

    return run if plain else program


def _strides(tensor: Tensor) -> tuple[int, ...] | None:
    """Return the memory layout of a tensor; None if it is sparse, or if a lazy module has not made it yet."""
    try:
        return tensor.stride()
    except (RuntimeError, ValueError):  # torch's errors for these two
        return None


def _describe(value: Any, *, exact: bool) -> Hashable:
    """Describe arguments: tensors by shape, dtype and device, the rest by value."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        form = type(value), tuple(value.shape), value.dtype, getattr(value, "device", None)
        return (*form, getattr(value, "requires_grad", False)) if exact else form
    if isinstance(value, dict):
        return type(value), *((key, _describe(v, exact=exact)) for key, v in value.items())
    if isinstance(value, list | tuple):
        return type(value), *(_describe(v, exact=exact) for v in value)
    if isinstance(value, float) and not exact:
        return float
    try:
        hash(value)
    except TypeError:
        return object() if exact else type(value)  # an object is equal to no other
    return type(value), value
