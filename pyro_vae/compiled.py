"""CompiledELBO: any model, guide and ELBO captured once as a graph of tensor operations, and compiled.

Pyro's handlers run in Python at every step, and a compiler that follows the Python stops at each of
them. What they compute for a pair of static structure is however always the same tensor operations:
so one run of the loss and its gradients is recorded below the handlers (``make_fx``), the parameters
and buffers become the graph's inputs, and from then on a step is one call of the compiled graph.
"""

import sys
import traceback
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, cast
from unittest import mock

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.poutine.runtime import _PYRO_STACK, am_i_wrapped
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from pyro_vae.handlers import KLWeight, active_weights
from pyro_vae.pairs import Before, Program, modules, parameters, signature, with_statements

# So many uses of another signature than the first are worth compiling it.
_OFTEN = 20

# The least side of a matrix whose product oneDNN speeds up.
_SMALL = 32

# Where the frames of a traceback are not the user's.
_LIBRARIES = tuple(str(Path(str(file)).parent) for file in (torch.__file__, pyro.__file__, __file__))


class CompiledELBO(ELBO):
    """An ELBO whose loss and gradients run as one compiled graph: what ``Jit*_ELBO`` were for.

    ::

        svi = SVI(model, guide, optim, loss=CompiledELBO(TraceMeanField_ELBO()))

    A drop-in for the ELBO inside, under this package's SVI and Pyro's. The first step of each
    signature is captured. The first of all is compiled at once, which takes some seconds; the operations of
    another signature are replayed one by one until it has come twenty times. A signature is the shapes,
    dtypes and devices of all tensors in the arguments, the values of the other arguments, the set of
    trainable parameters, each module's train or eval mode and autocast; so a smaller last batch has a graph
    of its own. Parameters, buffers and tensors that the pair closes over are read at every step, and
    random operations draw anew. What changes from step to step as a *Python* number cannot be seen:
    pass it as a tensor.

    Pair and ELBO must have static structure: the same sites and operations at every step. What reads
    a tensor into Python (``if z.sum() > 0``) is refused when it is captured. Every capture is held
    against a second, eager run with the same noise, which finds what changes between two runs.

    Args:
        elbo: any Pyro ELBO, by its ``differentiable_loss``, else by its ``loss_and_grads``.
        backend: of ``torch.compile``. The default needs a C++ compiler on a CPU, and takes its normal
            noise there from torch's stream, as eager does; on a GPU it runs as a CUDA graph with a stream
            of its own. "eager" replays the captured operations one by one, and compiles nothing.
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
        self._losses: dict[Hashable, _Loss] = {}
        self._compiled: set[tuple[Program, Program]] = set()

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Return the loss of a batch in nats."""
        return float(self._loss(model, guide, args, kwargs, gradients=False).graph(*args, **kwargs)[0])

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Return the loss of a batch in nats, and add its gradients to the parameters'."""
        captured = self._loss(model, guide, args, kwargs, gradients=True)
        loss, *gradients = captured.graph(*args, **kwargs)
        for p, gradient in zip(captured.trained, gradients, strict=True):
            p.grad = gradient if p.grad is None else p.grad + gradient
        return float(loss)

    def _loss(
        self,
        model: Program,
        guide: Program,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        gradients: bool,
    ) -> "_Loss":
        key = (model, guide, gradients, _state(model, guide), _around(), signature((args, kwargs)))
        loss = self._losses.get(key)
        if loss is None:
            loss = _Loss(self.elbo, model, guide, args, kwargs, gradients)
            loss.graph = Graph(loss, (model, guide), args, kwargs)
            # The first step is compiled at once; a smaller last batch, say, when it has come often.
            first = gradients and (model, guide) not in self._compiled
            loss.until_compiled = 0 if first else _OFTEN
            self._losses[key] = loss
        elif self.check:
            loss.graph.check(args, kwargs)
        if loss.until_compiled == 0 and self.backend != "eager":
            loss.graph.compile(self.backend)
            self._compiled.add((model, guide))
        loss.until_compiled -= 1
        if am_i_wrapped():
            loss.issue_statements()
        return loss

    def _get_trace(self, model: Program, guide: Program, args: Any, kwargs: Any) -> Any:
        return self.elbo._get_trace(model, guide, args, kwargs)


class _Loss:
    """The loss of a pair, and its gradients if asked for: what is captured."""

    def __init__(
        self,
        elbo: Any,
        model: Program,
        guide: Program,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        gradients: bool,
    ) -> None:
        self._elbo, self._model, self._guide = elbo, model, guide
        before = Before(model, guide)
        try:
            # A first run makes what is made at first use, and shows the parameter statements.
            with poutine.trace(param_only=True) as first, _quiet():
                elbo.loss(model, guide, *args, **kwargs)
        finally:
            before.restore()
        store = pyro.get_param_store()
        self._statements = [
            (name, store._params[name], store._constraints[name]) for name in first.trace.nodes
        ]
        found = parameters(model, guide) + [p for _, p, _ in self._statements]
        self.trained = list({id(p): p for p in found}.values()) if gradients else []
        self.graph: Graph
        self.until_compiled: int  # so many uses

    def __call__(self, *args: Any, **kwargs: Any) -> list[Tensor]:
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
        memory: set[int] = set()
        distinct = []
        for _, g in used:
            # Autograd hands out one tensor for the gradients of a and b in a + b.
            shared = g.untyped_storage().data_ptr() in memory
            memory.add(g.untyped_storage().data_ptr())
            distinct.append(g.detach().clone() if shared else g.detach())
        return [torch.as_tensor(loss).detach(), *distinct]

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


class Graph:
    """A function of a pair and a batch, captured at the batch's signature.

    It replays the operations one by one until it is compiled.

    Args:
        function: runs the programs and returns a tensor or a list of them.
        programs: those it runs; their parameters and buffers become inputs of the graph.
        args: a batch, with which it is captured.
        kwargs: likewise.

    Raises:
        ValueError: naming the line that cannot be captured and the mend.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        programs: tuple[Program, ...],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self._function, self._programs = function, programs
        before = Before(*programs)
        try:
            self._captured, self._read = self._capture(args, kwargs)
            before.restore()
            torch.rand(())  # so that the second run has other noise than the captured one
            self.check(args, kwargs)
        finally:
            before.restore()
        self._on_cuda = any(tensor.is_cuda for tensor in self._inputs(args, kwargs))
        self._run: Any = self._captured

    def compile(self, backend: str = "inductor") -> "Graph":
        """Compile the operations by a backend of ``torch.compile``, at the next call; return the graph."""
        options: dict[str, Any] = {}
        if backend == "inductor":
            # What a graph depends on is in the key it is found by, so nothing is left to be guarded.
            options["guard_filter_fn"] = lambda guards: [False] * len(guards)
            options["triton.cudagraphs"] = self._on_cuda
            # On a CPU torch's own noise is drawn faster than the compiler's, and is eager's.
            options["fallback_random"] = not self._on_cuda
        self._run = torch.compile(
            _with_onednn(self._captured), backend=backend, fullgraph=True, dynamic=False, options=options
        )
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the function would."""
        with torch.no_grad():
            return self._run(*self._inputs(args, kwargs))

    def check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hold the graph against the function itself, both with the same noise.

        Raises:
            ValueError: if what they return differs.
        """
        before = Before(*self._programs)
        try:
            with torch.no_grad():
                captured = self._captured(*self._inputs(args, kwargs))
            before.restore()
            with _quiet():
                eager = self._function(*args, **kwargs)
        finally:
            before.restore()
        for pair in zip(*map(pytree.tree_leaves, (captured, eager)), strict=True):
            repeated, expected = (tensor.double() for tensor in pair)
            tolerance = float(1e-5 * expected.nan_to_num().abs().max() + 1e-6)
            if not torch.allclose(repeated, expected, rtol=0, atol=tolerance, equal_nan=True):
                error = (repeated - expected).abs().max()
                raise ValueError(
                    "The captured graph does not repeat the pair: its numbers are off by "
                    f"{float(error):.3g}. Something that is no tensor changes between two runs: a "
                    "counter, a Python or NumPy random number, an attribute set anew. Pass it as a "
                    "tensor, or do without compiling."
                )

    def _capture(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[GraphModule, list[Tensor]]:
        """Record one run below the handlers, and make every tensor it reads an input."""
        leaves, structure = pytree.tree_flatten((args, kwargs))
        for leaf in leaves:
            if not isinstance(leaf, Tensor) and (
                hasattr(leaf, "dtype") or isinstance(leaf, dict | list | tuple)
            ):
                raise ValueError(
                    f"A graph would keep the numbers of the first {type(leaf).__name__} that it is given. "
                    "Expected tensors, alone or in plain tuples, lists and dicts: use torch.as_tensor(x)."
                )
        where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        weights = active_weights()
        betas = [weight.beta for weight in weights]

        def run(*tensors: Tensor) -> Any:
            for i, tensor in zip(where, tensors, strict=False):
                leaves[i] = tensor
            for weight, tensor in zip(weights, tensors[len(where) :], strict=True):
                weight.beta = tensor
            traced_args, traced_kwargs = pytree.tree_unflatten(leaves, structure)
            return self._function(*traced_args, **traced_kwargs)

        buffers = dict(_buffers(*self._programs))
        try:
            with _quiet(), _TensorItem():
                captured = make_fx(run)(*self._given(args, kwargs))
        except Exception as error:
            raise ValueError(
                f"A graph cannot capture this pair: {_line(error)}: {_first_line(error)}. "
                "Expected tensor operations alone, the same at every step: use torch.where for a choice "
                "by value, keep numbers in tensors, or do without compiling."
            ) from error
        finally:
            for weight, beta in zip(weights, betas, strict=True):
                weight.beta = beta
        for (module, name), buffer in _buffers(*self._programs):
            if buffers.get((module, name), buffer) is not buffer:
                raise ValueError(
                    f"A run of the pair sets the buffer '{name}' of {type(module).__name__} anew, which "
                    "the graph would not repeat. Update it in place: self.buffer.copy_(...)."
                )
        # What the run read besides its arguments stands in the graph as constants.
        graph = captured.graph
        for node in graph.nodes:
            if _has_shape_by_value(node):
                raise ValueError(
                    f"A graph cannot capture this pair: the shape of {node.target}'s result depends on "
                    "values, and a graph would keep that of the first run. Use a mask (torch.where, "
                    "poutine.mask) in place of a selection, or do without compiling."
                )
        lifted: dict[int, tuple[Node, Tensor]] = {}
        start = next(iter(graph.nodes))
        for node in list(graph.nodes):
            if node.op == "get_attr":
                tensor = getattr(captured, node.target)
                if id(tensor) not in lifted:
                    with graph.inserting_before(start):
                        placeholder = graph.placeholder(f"read_{len(lifted)}")
                    placeholder.meta["val"] = tensor
                    lifted[id(tensor)] = placeholder, tensor
                node.replace_all_uses_with(lifted[id(tensor)][0])
                graph.erase_node(node)
        captured.recompile()
        return captured, [tensor for _, tensor in lifted.values()]

    def _inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        return [tensor.detach() for tensor in self._read] + self._given(args, kwargs)

    def _given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """What a step brings along: the tensors of its arguments, and the KL weights around it."""
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        wide = (tensor for tensor in given if tensor.dtype in (torch.float32, torch.float64))
        like = next(wide, torch.empty(()))
        given += [torch.as_tensor(weight.beta).to(like) for weight in active_weights()]
        # A tensor given twice, or held by the pair as well, is two inputs: next time it may be two tensors.
        return [tensor.detach().contiguous() for tensor in given]


_LIBRARY = torch.library.Library("pyro_vae", "DEF")
_LIBRARY.define("matmul(Tensor a, Tensor b, Tensor? bias) -> Tensor")


@torch.library.impl(_LIBRARY, "matmul", "CPU")
def _matmul(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """Return a @ b + bias by oneDNN: (n, k), (k, m), (m,) or None, all float32."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise.default(a, b.t(), bias, "none", [], "")
    return product


@torch.library.impl(_LIBRARY, "matmul", "Meta")
def _matmul_shape(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


def _with_onednn(captured: GraphModule) -> GraphModule:
    """Send a graph's float32 matrix products on a CPU to oneDNN, in place of torch's default library.

    That is MKL, which takes twice oneDNN's time on a processor that Intel did not make. What oneDNN
    computes is as exact; it takes a product's left side row by row and gains nothing on small ones.
    """
    graph = deepcopy(captured.graph)
    aten = torch.ops.aten
    for node in list(graph.nodes):
        if node.target not in (aten.mm.default, aten.addmm.default) or node.kwargs:
            continue
        *bias, a, b = node.args
        shapes = [factor.meta["val"].shape for factor in (a, b)]
        value = node.meta["val"]
        if value.device.type != "cpu" or value.dtype != torch.float32 or min(map(min, shapes)) < _SMALL:
            continue
        if bias and bias[0].meta["val"].shape != value.shape[1:]:
            continue
        with graph.inserting_before(node):
            if not a.meta["val"].is_contiguous():
                a = graph.call_function(aten.clone.default, (a,), {"memory_format": torch.contiguous_format})
            arguments = (a, b, bias[0] if bias else None)
            product = graph.call_function(torch.ops.pyro_vae.matmul.default, arguments)
        node.replace_all_uses_with(product)
        graph.erase_node(node)
    return GraphModule(captured, graph)


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
    """What a graph depends on around the step: the handlers, with all that they hold.

    The number of a KL weight is an input of the graph, so that one graph serves a whole warm-up. A trace
    changes nothing.
    """
    return tuple(
        (type(handler), () if isinstance(handler, KLWeight | TraceMessenger) else _held(vars(handler)))
        for handler in _PYRO_STACK
    )


def _held(value: Any) -> Hashable:
    """Tell a value from others: containers by what is in them, tensors and functions by identity."""
    if isinstance(value, dict):
        return tuple((key, _held(held)) for key, held in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(_held, value))
    return value if isinstance(value, Hashable) else id(value)


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
    """Keep Pyro from looking into tensors: its validation, and its shortcuts and warnings by value.

    And autocast from handing the reduced parameters of one run on to the next.
    """
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
        torch.clear_autocast_cache()
        stack.callback(torch.clear_autocast_cache)
        yield


def _line(error: BaseException) -> str:
    """Name the line of the user's that an error comes from."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(_LIBRARIES)]
    frame = (own or list(frames))[-1]
    return f"{Path(frame.filename).name}, line {frame.lineno}, {frame.line!r}"


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0].partition(". ")[0]
