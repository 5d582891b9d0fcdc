"""CompiledELBO: any model, guide and ELBO captured once as a graph of tensor operations, and compiled.

Pyro's handlers run in Python at every step, and a compiler that follows the Python stops at each of
them. What they compute for a pair of static structure is however always the same tensor operations:
so one run of the loss and its gradients is recorded below the handlers (``make_fx``), the parameters
and buffers become the graph's inputs, and from then on a step is one call of the compiled graph.
"""

import sys
import traceback
import warnings
from collections.abc import Hashable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast
from unittest import mock

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.poutine.runtime import _PYRO_STACK, am_i_wrapped
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from pyro_vae.handlers import KLWeight, active_weights
from pyro_vae.pairs import Before, Program, modules, parameters, signature, with_statements

# Where the frames of a traceback are not the user's.
_LIBRARIES = tuple(str(Path(str(file)).parent) for file in (torch.__file__, pyro.__file__, __file__))


class CompiledELBO(ELBO):
    """An ELBO whose loss and gradients run as one compiled graph: what ``Jit*_ELBO`` were for.

    ::

        svi = SVI(model, guide, optim, loss=CompiledELBO(TraceMeanField_ELBO()))

    A drop-in for the ELBO inside, under this package's SVI and Pyro's. The first step of each
    signature is captured and compiled, which takes some seconds. A signature is the shapes, dtypes
    and devices of all tensors in the arguments, the values of the other arguments, the set of
    trainable parameters, each module's train or eval mode and autocast; so a smaller last batch has a graph
    of its own. Parameters, buffers and tensors that the pair closes over are read at every step, and
    random operations draw anew. What changes from step to step as a *Python* number cannot be seen:
    pass it as a tensor.

    Pair and ELBO must have static structure: the same sites and operations at every step. What reads
    a tensor into Python (``if z.sum() > 0``) is refused when it is captured. Every capture is held
    against a second, eager run with the same noise, which finds what changes between two runs.

    Args:
        elbo: any Pyro ELBO, by its ``differentiable_loss``, else by its ``loss_and_grads``.
        backend: of ``torch.compile``. The default draws the right distributions from a random stream of
            its own; "eager" replays the captured operations one by one with eager's numbers, and needs no
            C++ compiler.
        check: hold every step against an eager run with the same noise. Slow; for finding out what a
            capture froze.

    Raises:
        ValueError: from the first step of a signature, naming the line that cannot be captured and the
            mend, or if the graph does not repeat the pair; with ``check``, from any step.
    """

    def __init__(self, elbo: ELBO, *, backend: str = "inductor", check: bool = False) -> None:
        super().__init__()
        if not isinstance(elbo, ELBO) or isinstance(elbo, CompiledELBO):
            raise ValueError(f"CompiledELBO expects a Pyro ELBO, such as Trace_ELBO(), got {elbo!r}.")
        vars(self).update(vars(elbo))  # num_particles and the like are those of the ELBO inside
        self.elbo: Any = elbo
        self.backend = backend
        self.check = check
        self._graphs: dict[Hashable, _Graph] = {}

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Return the loss of a batch in nats."""
        return float(self._graph(model, guide, args, kwargs, gradients=False)(args, kwargs)[0])

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Return the loss of a batch in nats, and add its gradients to the parameters'."""
        graph = self._graph(model, guide, args, kwargs, gradients=True)
        loss, *gradients = graph(args, kwargs)
        for p, gradient in zip(graph.trained, gradients, strict=True):
            p.grad = gradient if p.grad is None else p.grad + gradient
        return float(loss)

    def _graph(
        self,
        model: Program,
        guide: Program,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        gradients: bool,
    ) -> "_Graph":
        key = (model, guide, gradients, _state(model, guide), _around(), signature((args, kwargs)))
        graph = self._graphs.get(key)
        if graph is None:
            graph = _Graph(self.elbo, model, guide, args, kwargs, gradients, self.backend)
            self._graphs[key] = graph
        elif self.check:
            graph.check(args, kwargs)
        if am_i_wrapped():
            graph.issue_statements()
        return graph

    def _get_trace(self, model: Program, guide: Program, args: Any, kwargs: Any) -> Any:
        return self.elbo._get_trace(model, guide, args, kwargs)


class _Graph:
    """The loss, and the gradients if asked for, of one pair at one signature."""

    def __init__(
        self,
        elbo: Any,
        model: Program,
        guide: Program,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        gradients: bool,
        backend: str,
    ) -> None:
        self._elbo, self._model, self._guide = elbo, model, guide
        before = Before(model, guide)
        try:
            buffers = dict(_buffers(model, guide))
            # A first run makes what is made at first use, and shows the parameter statements.
            with poutine.trace(param_only=True) as first, _quiet():
                elbo.loss(model, guide, *args, **kwargs)
            for (module, name), buffer in _buffers(model, guide):
                if buffers.get((module, name), buffer) is not buffer:
                    raise ValueError(
                        f"A run of the pair sets the buffer '{name}' of {type(module).__name__} anew, which "
                        "the graph would not repeat. Update it in place: self.buffer.copy_(...)."
                    )
            store = pyro.get_param_store()
            self._statements = [
                (name, store._params[name], store._constraints[name]) for name in first.trace.nodes
            ]
            found = parameters(model, guide) + [p for _, p, _ in self._statements]
            self.trained = list({id(p): p for p in found}.values()) if gradients else []
            before.restore()
            self._captured, self._read = self._capture(args, kwargs)
            before.restore()
            torch.rand(())  # so that the second run has other noise than the captured one
            self.check(args, kwargs)
        finally:
            before.restore()
        self._run: Any = self._captured
        if backend != "eager":
            on_cuda = any(tensor.is_cuda for tensor in self._inputs(args, kwargs))
            mode = "reduce-overhead" if on_cuda and backend == "inductor" else None  # a CUDA graph
            self._run = torch.compile(
                self._captured, backend=backend, fullgraph=True, dynamic=False, mode=mode
            )

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        with torch.no_grad():
            outputs: list[Tensor] = self._run(*self._inputs(args, kwargs))
        return outputs

    def check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hold the graph against the pair itself, both with the same noise.

        Raises:
            ValueError: if loss or gradients differ.
        """
        before = Before(self._model, self._guide)
        try:
            with torch.no_grad():
                captured = self._captured(*self._inputs(args, kwargs))
            before.restore()
            with _quiet():
                eager = self._evaluate(args, kwargs)
        finally:
            before.restore()
        for repeated, expected in zip(captured, eager, strict=True):
            error = (repeated - expected).abs().max()
            if error > 1e-5 * expected.abs().max() + 1e-6:
                raise ValueError(
                    "The captured graph does not repeat the pair: loss or gradients are off by "
                    f"{float(error):.3g}. Something that is no tensor changes between two runs: a "
                    "counter, a Python or NumPy random number, an attribute set anew. Pass it as a "
                    "tensor, or use the ELBO without CompiledELBO."
                )

    def issue_statements(self) -> None:
        """Make the pair's ``pyro.param`` statements, from which pyro.infer.SVI learns what to train."""
        stated = {id(p) for _, p, _ in self._statements}
        if any(id(p) not in stated for p in self.trained):
            raise ValueError(
                "pyro.infer.SVI would not train some of this pair's parameters: Pyro's store holds others of "
                "their names, of an earlier pair, or the pair is a plain nn.Module. Call "
                "pyro.clear_param_store() before a new pair, or use pyro_vae.SVI."
            )
        store = pyro.get_param_store()
        for name, p, constraint in self._statements:
            if store._params.setdefault(name, p) is not p:
                raise ValueError(
                    f"Pyro's parameter store holds another parameter named '{name}', of an earlier "
                    "pair. Expected this pair's: call pyro.clear_param_store(), or use pyro_vae.SVI."
                )
            store._constraints.setdefault(name, constraint)
            store._param_to_name.setdefault(p, name)
            pyro.param(name)

    def _evaluate(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """Run the ELBO inside, as it is: the loss, then a gradient for each trained parameter.

        A parameter without a gradient leaves ``trained``.
        """
        if not self.trained:
            return [torch.as_tensor(self._elbo.loss(self._model, self._guide, *args, **kwargs)).detach()]
        if hasattr(self._elbo, "differentiable_loss"):
            loss = self._elbo.differentiable_loss(self._model, self._guide, *args, **kwargs)
            gradients: Any = torch.autograd.grad(loss, self.trained, allow_unused=True)
        else:
            held = [p.grad for p in self.trained]
            for p in self.trained:
                p.grad = None
            try:
                model, guide = with_statements(self._model), with_statements(self._guide)
                loss = self._elbo.loss_and_grads(model, guide, *args, **kwargs)
                gradients = tuple(p.grad for p in self.trained)
            finally:
                for p, gradient in zip(self.trained, held, strict=True):
                    p.grad = gradient
        used = [(p, g) for p, g in zip(self.trained, gradients, strict=True) if g is not None]
        self.trained = [p for p, _ in used]
        return [torch.as_tensor(loss).detach(), *(g.detach() for _, g in used)]

    def _capture(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[GraphModule, list[Tensor]]:
        """Record one run below the handlers, and make every tensor it reads an input."""
        leaves, structure = pytree.tree_flatten((args, kwargs))
        where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        weights = active_weights()
        betas = [weight.beta for weight in weights]

        def run(*tensors: Tensor) -> list[Tensor]:
            for i, tensor in zip(where, tensors, strict=False):
                leaves[i] = tensor
            for weight, tensor in zip(weights, tensors[len(where) :], strict=True):
                weight.beta = tensor
            traced_args, traced_kwargs = pytree.tree_unflatten(leaves, structure)
            return self._evaluate(traced_args, traced_kwargs)

        try:
            with _quiet(), _TensorItem():
                captured = make_fx(run)(*self._given(args, kwargs))
        except Exception as error:
            raise ValueError(
                f"CompiledELBO cannot capture this pair: {_line(error)}: {_first_line(error)}. "
                "Expected tensor operations alone, the same at every step: use torch.where for a choice "
                "by value, keep numbers in tensors, or use the ELBO without CompiledELBO."
            ) from error
        finally:
            for weight, beta in zip(weights, betas, strict=True):
                weight.beta = beta
        # What the run read besides its arguments stands in the graph as constants.
        graph = captured.graph
        for node in graph.nodes:
            if _has_shape_by_value(node):
                raise ValueError(
                    f"CompiledELBO cannot capture this pair: the shape of {node.target}'s result depends on "
                    "values, and a graph would keep that of the first run. Use a mask (torch.where, "
                    "poutine.mask) in place of a selection, or use the ELBO without CompiledELBO."
                )
        lifted: dict[int, tuple[Node, Tensor]] = {}
        start = next(iter(graph.nodes))
        for node in list(graph.nodes):
            if node.op == "get_attr":
                tensor = getattr(captured, node.target)
                if id(tensor) not in lifted:
                    with graph.inserting_before(start):
                        lifted[id(tensor)] = graph.placeholder(f"read_{len(lifted)}"), tensor
                node.replace_all_uses_with(lifted[id(tensor)][0])
                graph.erase_node(node)
        captured.recompile()
        return captured, [tensor for _, tensor in lifted.values()]

    def _inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        return [tensor.detach() for tensor in self._read] + self._given(args, kwargs)

    def _given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """What a step brings along: the tensors of its arguments, and the KL weights around it."""
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        like = next((tensor for tensor in given if tensor.is_floating_point()), torch.empty(()))
        return given + [torch.as_tensor(weight.beta).to(like) for weight in active_weights()]


def _has_shape_by_value(node: Node) -> bool:
    # Pyro's own enumeration selects by masks that are the same at every step.
    if node.target is torch.ops.aten.masked_select.default:
        return False
    if torch.Tag.dynamic_output_shape not in getattr(node.target, "tags", ()):
        return False
    if node.target is not torch.ops.aten.index.Tensor:
        return True
    indices = [index for index in cast(Any, node.args[1]) if isinstance(index, Node)]
    return any(index.meta["val"].dtype in (torch.bool, torch.uint8) for index in indices)


def _buffers(*programs: Program) -> Iterator[tuple[tuple[nn.Module, str], Tensor | None]]:
    for owner in modules(*programs):
        for module in owner.modules():
            for name, buffer in module._buffers.items():
                yield (module, name), buffer


def _state(*programs: Program) -> Hashable:
    """What a pair's graph depends on besides its arguments: parameters, buffers, modes, autocast."""
    state: list[Hashable] = [
        torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) for device in ("cpu", "cuda")
    ]
    for owner in modules(*programs):
        for module in owner.modules():
            state.append(module.training)
            state += [(id(p), p.requires_grad) for p in module._parameters.values() if p is not None]
            state += map(id, module._buffers.values())
    return tuple(state)


def _around() -> Hashable:
    """What a graph depends on around the step: the handlers, with the numbers and tensors that they hold.

    The number of a KL weight is an input of the graph, so that one graph serves a whole warm-up.
    """
    around: list[Hashable] = []
    for handler in _PYRO_STACK:
        held = [] if isinstance(handler, KLWeight) else list(vars(handler).values())
        numbers = (value for value in held if isinstance(value, bool | int | float))
        tensors = (id(value) for value in held if isinstance(value, Tensor))
        around.append((type(handler), *numbers, *tensors))
    return tuple(around)


class _TensorItem(TorchFunctionMode):
    """``tensor.item()`` stays a tensor, as Pyro's ELBOs call it on their loss."""

    def __torch_function__(
        self,
        function: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if function is Tensor.item:
            return args[0].detach()
        return function(*args, **(kwargs or {}))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Pyro from looking into tensors: its validation, and its shortcuts and warnings by value."""
    with ExitStack() as stack:
        stack.enter_context(pyro.validation_enabled(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # type: ignore[attr-defined]
        # Pyro asks this before it reads a tensor.
        stack.enter_context(mock.patch.object(torch._C, "_get_tracing_state", return_value=True))
        for name, module in list(sys.modules.items()):
            if name.startswith("pyro.infer") and hasattr(module, "warn_if_nan"):
                stack.enter_context(mock.patch.object(module, "warn_if_nan", lambda value, *_, **__: value))
        yield


def _line(error: BaseException) -> str:
    """Name the line of the user's that an error comes from."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(_LIBRARIES)]
    frame = (own or list(frames))[-1]
    return f"{Path(frame.filename).name}, line {frame.lineno}, {frame.line!r}"


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0].partition(". ")[0]
