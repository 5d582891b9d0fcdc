"""Graph: a function of a pair, recorded below Pyro's handlers as tensor operations, and compiled.

One run is recorded (``make_fx``); the parameters, buffers and whatever else it reads become inputs of the
graph; and what a graph would freeze silently is refused.
"""

import gc
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast
from unittest import mock

import pyro
import torch
import torch._inductor
from pyro.infer.util import Dice
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

import pyro_vae
from pyro_vae.compiled.cpu.bernoulli_kernel import compute_bernoulli_in_one_pass, register_bernoulli_lowering
from pyro_vae.compiled.cpu.cpp_kernels import (
    compiler_error,
    first_sentence,
    kernels_in_one_file,
    vector_options,
)
from pyro_vae.compiled.cpu.matrix_products import (
    compute_products_by_tiles,
    register_tile_lowering,
    send_products_to_onednn,
)
from pyro_vae.elbos.kl_weight import active_weights
from pyro_vae.programs.pair import Before, Inside, Program

# Where the frames of a traceback are not the user's.
_LIBRARIES = tuple(str(Path(str(file)).parent) for file in (torch.__file__, pyro.__file__, pyro_vae.__file__))


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
            with _no_collection():
                self._captured, self._read = self._capture(args, kwargs)
            before.restore()
            devices = {tensor.device for tensor in self._inputs(args, kwargs)}
            for device in devices | {torch.device("cpu")}:
                torch.rand((), device=device)  # so that the second run has other noise than the captured one
            self.check(args, kwargs)
        finally:
            before.restore()
        _keep_freed_memory()
        self._on_cuda = any(tensor.is_cuda for tensor in self._inputs(args, kwargs))
        self._run: Any = _by_torch(send_products_to_onednn(self._captured))

    def compile(self) -> "Graph":
        """Compile the operations at the next call; return the graph."""
        self._run = self._compiled
        return self

    def _compiled(self, *inputs: Tensor) -> Any:
        # Below torch.compile, whose guards ask at every call what the key a graph is found by has settled.
        options = {
            "triton.cudagraphs": self._on_cuda,
            # On a CPU torch's own noise is drawn faster than the compiler's, and is eager's.
            "fallback_random": not self._on_cuda,
            **vector_options(),
        }
        try:
            register_bernoulli_lowering()
            register_tile_lowering()
            graph = compute_products_by_tiles(compute_bernoulli_in_one_pass(self._captured))
            with kernels_in_one_file():
                self._run = torch._inductor.compile(graph, list(inputs), options)
        except Exception as error:
            raise compiler_error(error, "this graph") from error
        return self._run(*inputs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the function would."""
        # What autocast reduces is captured. It would also reduce what a program, or the way that a product
        # takes, has kept in float32.
        with torch.no_grad(), torch._C._DisableAutocast():
            return self._run(*self._inputs(args, kwargs))

    def check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hold the graph against the function itself, both with the same noise.

        Raises:
            ValueError: if what they return or leave in the buffers differs.
        """
        before = Before(*self._programs)
        try:
            with torch.no_grad(), torch._C._DisableAutocast():
                captured = self._captured(*self._inputs(args, kwargs)), self._held()
            before.restore()
            with quiet():
                eager = self._function(*args, **kwargs), self._held()
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

    def _held(self) -> list[Tensor]:
        """What the buffers hold now."""
        held = (buffer for _, _, buffer in Inside(*self._programs).buffers)
        return [buffer.clone() for buffer in held if buffer is not None and buffer.numel()]

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

        buffers = {(module, name): buffer for module, name, buffer in Inside(*self._programs).buffers}
        try:
            with quiet(), _TensorsStay():
                captured = make_fx(run)(*self._given(args, kwargs))
        except Exception as error:
            raise ValueError(
                f"A graph cannot capture this pair: {_line(error)}: {first_sentence(error)}. "
                "Expected tensor operations alone, the same at every step: use torch.where for a choice "
                "by value, keep numbers in tensors, or do without compiling."
            ) from error
        finally:
            for weight, beta in zip(weights, betas, strict=True):
                weight.beta = beta
        for module, name, buffer in Inside(*self._programs).buffers:
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
        _simplify(graph)
        captured.recompile()
        return captured, [tensor for _, tensor in lifted.values()]

    def _inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        tensors = [tensor.detach() for tensor in self._read] + self._given(args, kwargs)
        # A compiled graph reads memory, where what is lazily negated or conjugated still is not.
        return [tensor.resolve_conj().resolve_neg() for tensor in tensors]

    def _given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """What a step brings along: the tensors of its arguments, and the KL weights around it."""
        given = [leaf for leaf in pytree.arg_tree_leaves(*args, **kwargs) if isinstance(leaf, Tensor)]
        weights = active_weights()
        if weights:
            wide = (tensor for tensor in given if tensor.dtype in (torch.float32, torch.float64))
            like = next(wide, torch.empty(()))
            given += [torch.as_tensor(weight.beta).to(like) for weight in weights]
        # A tensor given twice, or held by the pair as well, is two inputs: next time it may be two tensors.
        return [tensor.detach().contiguous() for tensor in given]


def _simplify(graph: torch.fx.Graph) -> None:
    """Drop what changes nothing, or what nothing comes of; draw standard normal noise in one operation."""
    aten = torch.ops.aten
    for node in graph.nodes:
        if node.target in (aten.alias.default, aten.expand.default, aten.view.default):
            before, after = node.args[0].meta["val"], node.meta["val"]
            dense = isinstance(before, Tensor) and isinstance(after, Tensor)
            if dense and (before.shape, before.stride()) == (after.shape, after.stride()):
                node.replace_all_uses_with(node.args[0])
        elif node.target is aten.t.default and node.args[0].target is aten.t.default:
            node.replace_all_uses_with(node.args[0].args[0])
        elif node.target is aten.normal.Tensor_Tensor and not node.kwargs:
            mean, sigma = node.args
            standard = (mean.target, sigma.target) == (aten.zeros.default, aten.ones.default)
            alike = (mean.args, mean.kwargs) == (sigma.args, sigma.kwargs)
            if standard and alike and [*mean.users] == [*sigma.users] == [node]:
                with graph.inserting_before(node):  # the same numbers, from the same random stream
                    noise = graph.call_function(aten.randn.default, mean.args, mean.kwargs)
                noise.meta["val"] = node.meta["val"]
                node.replace_all_uses_with(noise)
                graph.erase_node(node)
    # What goes: a log probability, say, in whose place the ELBO takes an analytic KL. What stays: what has
    # an effect, also what does not own up to it in its signature, as BatchNorm's update of its statistics.
    effects = "batch_norm", "assert"
    graph.eliminate_dead_code(
        lambda node: node.is_impure() or any(effect in str(node.target) for effect in effects)
    )


def _by_torch(captured: GraphModule) -> GraphModule:
    """Call the commonest operations by torch's functions of their names, the way with half as much Python."""
    aten = torch.ops.aten
    others = aten.mm.default, aten.addmm.default, aten.t.default, aten.sum.default, aten.sum.dim_IntList
    for node in captured.graph.nodes:
        target = node.target  # torch.index_put, say, does not take a None in a list, as its operation does
        if isinstance(target, OpOverload) and target.namespace == "aten":
            common = torch.Tag.pointwise in target.tags or target in others
            node.target = getattr(torch, target.overloadpacket.__name__, target) if common else target
    captured.recompile()
    return captured


def _keep_freed_memory() -> None:
    """Let glibc keep the memory of a step's intermediate tensors for the next step.

    It gives freed memory back to the system, and the next step faults it in again, page by page, until the
    process has freed one block about as large as this: then it keeps twice as much. Without glibc nothing
    happens.
    """
    torch.empty((32 << 20) - (64 << 10), dtype=torch.uint8, device="cpu")


def _has_shape_by_value(node: Node) -> bool:
    if torch.Tag.dynamic_output_shape not in getattr(node.target, "tags", ()):
        return False
    if node.target is not torch.ops.aten.index.Tensor:
        return True
    indices = [index for index in cast(Any, node.args[1]) if isinstance(index, Node)]
    return any(index.meta["val"].dtype in (torch.bool, torch.uint8) for index in indices)


class _TensorsStay(TorchFunctionMode):
    """``tensor.item()`` stays a tensor, as Pyro's ELBOs call it on their loss. Other ways out are refused.

    They do not pass where operations are recorded, and a graph would keep the numbers of the first batch.
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
        return function(*args, **(kwargs or {}))


_expectation = Dice.compute_expectation


def _expectation_of_one_shape(*args: Any, **kwargs: Any) -> Any:
    """Take Pyro's expectation over enumerated sites, with zeros where it drops what has no probability."""
    with mock.patch.object(Tensor, "masked_select", lambda x, mask: torch.where(mask, x, 0).flatten()):
        return _expectation(*args, **kwargs)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python's garbage collector from going again and again through all that a capture makes.

    None of it is garbage yet, and up to half of a capture's time would go there.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Pyro from looking into tensors: its validation, and its shortcuts and warnings by value.

    And autocast from keeping reduced parameters: a capture does not, and the gradients of a parameter that is
    used twice are then added before they are rounded.
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
        stack.enter_context(mock.patch.object(Dice, "compute_expectation", _expectation_of_one_shape))
        stack.callback(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
        torch.set_autocast_cache_enabled(False)
        yield


def _line(error: BaseException) -> str:
    """Name the line of the user's that an error comes from."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(_LIBRARIES)]
    frame = (own or list(frames))[-1]
    return f"{Path(frame.filename).name}, line {frame.lineno}, {frame.line!r}"
