"""A pair, (model, guide): the modules and parameters behind it, and runs that leave it as it was."""

import functools
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pyro
import torch
from pyro.nn import PyroModule
from pyro.params.param_store import ParamStoreDict
from torch import Tensor, nn

Program = Callable[..., Any]
Batch = Tensor | tuple[Any, ...] | list[Any]


def modules(*programs: Program) -> list[nn.Module]:
    """Return the modules behind a model and a guide, each once.

    A program is a module, a method of one, or either of them wrapped by a Pyro handler
    (``poutine.scale(model, ...)``), ``functools.partial`` or ``functools.wraps``.
    """
    found: dict[int, nn.Module] = {}
    for program in programs:
        if isinstance(program, nn.Module):
            found.setdefault(id(program), program)
        elif isinstance(program, functools.partial):
            inner = [program.func, *program.args, *program.keywords.values()]
            found.update((id(m), m) for m in modules(*filter(callable, inner)))
        elif hasattr(program, "__wrapped__"):
            found.update((id(m), m) for m in modules(program.__wrapped__))
        else:
            owner = getattr(program, "__self__", None)  # of a bound method
            if isinstance(owner, nn.Module):
                found.setdefault(id(owner), owner)
    return list(found.values())


def parameters(model: Program, guide: Program) -> list[nn.Parameter]:
    """Return the trainable parameters of a model and a guide, a shared one once.

    What a torch optimiser is made of: ``torch.optim.Adam(parameters(model, guide), lr=1e-3)``.
    """
    return Inside(model, guide).trainable()


class Inside:
    """The modules behind programs and inside those, with what they hold.

    Attributes:
        modules: each once, in torch's order.
        parameters: theirs, frozen ones too, and one that two modules share twice.
        buffers: of each the module that holds it, its name, and itself or None.
        state: of each module itself, its mode, its parameters by identity, negative if frozen, dtype and
            strides, None, and its buffers by identity and strides.
    """

    def __init__(self, *programs: Program) -> None:
        # Made at every step, so in one walk; torch's own modules() also makes up their names.
        found: dict[nn.Module, None] = {}
        parameters: list[nn.Parameter] = []
        buffers: list[tuple[nn.Module, str, Tensor | None]] = []
        state: list[Hashable] = []

        def visit(module: nn.Module) -> None:
            if module in found:
                return
            found[module] = None
            state.extend((module, module.training))  # one without parameters may be replaced
            if module._parameters:
                for p in module._parameters.values():
                    if p is not None:
                        parameters.append(p)
                        state.extend((id(p) if p.requires_grad else -id(p), p.dtype, _strides(p)))
            state.append(None)
            if module._buffers:
                for name, buffer in module._buffers.items():
                    buffers.append((module, name, buffer))
                    state.extend((id(buffer), None if buffer is None else _strides(buffer)))
            if module._modules:
                for child in module._modules.values():
                    if child is not None:
                        visit(child)

        for module in modules(*programs):
            visit(module)
        self.modules, self.parameters, self.buffers, self.state = list(found), parameters, buffers, state

    def trainable(self) -> list[nn.Parameter]:
        """Return the trainable parameters, a shared one once."""
        return list({id(p): p for p in self.parameters if p.requires_grad}.values())


def _strides(tensor: Tensor) -> tuple[int, ...] | None:
    """Return how a tensor lies in memory; None if it is sparse, or a lazy module is yet to make it."""
    try:
        return tensor.stride()
    except (RuntimeError, ValueError):  # as torch says of the one and of the other
        return None


def check_names(model: Program, guide: Program) -> None:
    """Refuse PyroParams of one name in model and guide, which Pyro would tie silently.

    Raises:
        ValueError: naming the parameter.
    """
    holders: dict[str, int] = {}
    for module in Inside(model, guide).modules:
        if isinstance(module, PyroModule):
            for name in module._pyro_params:
                full_name = ".".join(filter(None, (module._pyro_name, name)))
                if holders.setdefault(full_name, id(module)) != id(module):
                    raise ValueError(
                        f"Two modules of model and guide have a PyroParam named '{full_name}', and "
                        "Pyro would make them one. Expected different names: rename one of them."
                    )


@contextmanager
def own_parameters(*programs: Program, validate: bool) -> Iterator[None]:
    """Run programs on the parameters in their modules, not on those of Pyro's global store.

    A fresh store takes each PyroParam and ``pyro.module`` from its module and is dropped at the end,
    so that nothing leaks from one pair to the next.
    """
    torch.clear_autocast_cache()  # inside one long autocast it would hold the parameters of an earlier step
    store = pyro.get_param_store()
    others = vars(store).copy()
    with ExitStack() as stack:
        stack.callback(vars(store).update, others)
        stack.callback(store.get_state)  # frees the parameters of what would keep them from being pickled
        vars(store).update(vars(ParamStoreDict()))
        stack.enter_context(pyro.validation_enabled(validate))
        if not all(p.requires_grad for p in Inside(*programs).parameters):
            # Pyro warns of every frozen parameter, which is frozen on purpose.
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", ".*was not registered in the param store")
        yield


def with_statements(program: Program) -> Program:
    """Issue ``pyro.module`` for the plain modules behind a program whenever it runs.

    Some of Pyro's ``loss_and_grads`` differentiate only where they see a parameter statement, which
    a PyroModule makes by itself and an nn.Module does not.
    """
    plain = [owner for owner in modules(program) if not isinstance(owner, PyroModule)]

    @functools.wraps(program)
    def run(*args: Any, **kwargs: Any) -> Any:
        for number, owner in enumerate(plain):
            pyro.module(f"_plain{number}", owner)
        return program(*args, **kwargs)

    return run if plain else program


@contextmanager
def evaluating(*programs: Program) -> Iterator[None]:
    """Run programs in eval mode, without gradients, and restore each module's mode and buffers."""
    owners = modules(*programs)
    before = Before(*programs)
    modes = [(module, module.training) for module in before.inside.modules]
    try:
        for owner in owners:
            owner.eval()
        with torch.no_grad():
            yield
    finally:
        before.restore_buffers()
        for module, training in modes:
            module.training = training


class Before:
    """What a forward pass can move, as it was: buffers (BatchNorm's) and the random state.

    Attributes:
        inside: what is inside the programs.
    """

    def __init__(self, *programs: Program) -> None:
        self.inside = Inside(*programs)
        self._buffers = [
            (module, name, buffer, buffer.clone())
            for module, name, buffer in self.inside.buffers
            if buffer is not None
        ]
        devices = {p.device for p in self.inside.parameters if not p.is_cpu}
        self._accelerators = [(torch.get_device_module(device), device) for device in devices]
        self._rng = torch.get_rng_state()
        self._accelerator_rngs = [m.get_rng_state(device) for m, device in self._accelerators]

    def restore_buffers(self) -> None:
        """Put the buffers back."""
        with torch.no_grad():
            for module, name, buffer, value in self._buffers:
                buffer.copy_(value)
                setattr(module, name, buffer)

    def restore(self) -> None:
        """Put the buffers and the random state back."""
        self.restore_buffers()
        torch.set_rng_state(self._rng)
        for (module, device), state in zip(self._accelerators, self._accelerator_rngs, strict=True):
            module.set_rng_state(state, device)

    def random_state_moved(self) -> bool:
        """Say whether a random number was drawn since."""
        now = [torch.get_rng_state(), *(m.get_rng_state(device) for m, device in self._accelerators)]
        then = [self._rng, *self._accelerator_rngs]
        with torch._C.DisableTorchFunction():  # a capture would refuse to read a tensor
            return any(a.numpy().tobytes() != b.numpy().tobytes() for a, b in zip(now, then, strict=True))


@contextmanager
def rehearsal(*programs: Program) -> Iterator[None]:
    """Run programs without gradients and leave buffers and random state as they were."""
    before = Before(*programs)
    try:
        with torch.no_grad():
            yield
    finally:
        before.restore()


def signature(value: Any, *, floats_by_value: bool = True) -> Hashable:
    """Describe arguments by the shape, dtype and device of their tensors and the value of the rest."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return type(value), tuple(value.shape), value.dtype, getattr(value, "device", None)
    if isinstance(value, dict):
        items = ((key, signature(v, floats_by_value=floats_by_value)) for key, v in value.items())
        return type(value), *items
    if isinstance(value, list | tuple):
        return type(value), *(signature(v, floats_by_value=floats_by_value) for v in value)
    if isinstance(value, float) and not floats_by_value:
        return float
    return (type(value), value) if isinstance(value, Hashable) else object()  # never the same as another


def as_args(batch: Batch) -> tuple[Any, ...]:
    """Return a batch as the arguments of model and guide.

    Raises:
        ValueError: if the batch is a dictionary or a string, which has no order of arguments.
    """
    if isinstance(batch, dict | str):
        raise ValueError(
            "A batch is a tensor, or a tuple or list of the arguments of model and guide, got "
            f"{type(batch).__name__}. Pass its values in their order."
        )
    return tuple(batch) if isinstance(batch, tuple | list) else (batch,)
