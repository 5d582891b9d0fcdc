"""CapturedGraph: a function of a pair, recorded below Pyro's handlers as tensor operations, and compiled.

One run is recorded (``make_fx``). The parameters, the buffers and everything else that it reads become inputs
of the graph. Anything that a graph would silently freeze is refused.
"""

import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from pyro_vae.compiled.attributes import check_hooks
from pyro_vae.compiled.cache_folder import check_cache_folder
from pyro_vae.compiled.internals import (
    compile_graph,
    copies,
    is_compiled,
    no_kept_sources,
    one_fake_mode,
    recorder,
)
from pyro_vae.compiled.passes import call_torch_functions, has_shape_by_value, simplify
from pyro_vae.compiled.products import choose_products
from pyro_vae.compiled.recording import KeepTensors, no_collection, no_value_checks
from pyro_vae.elbos.kl_weight import active_weights
from pyro_vae.programs import Pair
from pyro_vae.programs.pair import leaves, map_leaves

# A frame of a traceback below these folders is not the user's.
_LIBRARIES = (
    *(str(Path(str(module.__file__)).parent) for module in (torch, pyro)),
    str(Path(__file__).parents[1]),
)


class CapturedGraph:
    """A function of a pair, captured as tensor operations on its batch.

    It replays the operations one by one until it is compiled. It holds neither the pair nor the function, so
    a cache of it keeps no pair alive. Each call gets both again.

    Args:
        function: runs a pair and returns a tensor or a list of them.
        pair: the pair on a batch. Its parameters and buffers become inputs of the graph.

    Attributes:
        read: its inputs besides the batch: parameters, buffers, tensors that the pair closes over.

    Raises:
        ValueError: naming the line that cannot be captured and how to fix it.
    """

    def __init__(self, function: Callable[[Pair], Any], pair: Pair) -> None:
        check_hooks(pair)
        _check_modules(pair)
        before = pair.snapshot()
        try:
            with no_collection(), no_kept_sources():
                self._captured, self.read = _capture(function, pair)
                replayed = call_torch_functions(choose_products(self._captured))
            before.restore()
            devices = {tensor.device for tensor in self._inputs(pair)}
            for device in devices | {torch.device("cpu")}:
                torch.rand((), device=device)  # so that the second run has other noise than the captured one
            self.check(function, pair)
        finally:
            before.restore()
        _keep_freed_memory()
        self._on_cuda = any(tensor.is_cuda for tensor in self._inputs(pair))
        self._run: Any = replayed

    def compile(self) -> "CapturedGraph":
        """Compile the operations at the next call; return the graph."""
        self._run = self._compile_and_run
        return self

    def _compile_and_run(self, *inputs: Tensor) -> Any:
        check_cache_folder()
        try:
            compiled = compile_graph(choose_products(self._captured), inputs, on_cuda=self._on_cuda)
        except Exception as error:
            raise ValueError(
                f"torch's compiler: expected to compile this graph, got an error: {_first_sentence(error)}. "
                "On a CPU it needs a C++ compiler. To fix: install one such as g++, or use "
                "CompiledELBO(elbo, backend='eager'), which compiles nothing."
            ) from error
        self._run = _with_own_results(compiled) if self._on_cuda else compiled
        return self._run(*inputs)

    def __call__(self, pair: Pair) -> Any:
        """Return what the function would return for the pair."""
        with torch.no_grad(), _no_autocast():
            return self._run(*self._inputs(pair))

    def check(self, function: Callable[[Pair], Any], pair: Pair) -> None:
        """Compare the graph with the function it was captured from, both with the same noise.

        Raises:
            ValueError: if what they return or leave in the buffers differs.
        """
        before = pair.snapshot()
        try:
            with torch.no_grad(), _no_autocast():
                captured = self._captured(*self._inputs(pair)), _buffer_values(pair)
            before.restore()
            # The same layout: on nearly constant data, BatchNorm strongly enlarges the error of another one.
            alike = pair.on(*map_leaves(_contiguous, (pair.args, pair.kwargs)))
            with no_value_checks():
                eager = function(alike), _buffer_values(pair)
        finally:
            before.restore()
        for repeated, expected in zip(*map(leaves, (captured, eager)), strict=True):
            repeated, expected = repeated.double(), expected.double()
            tolerance = float(1e-5 * expected.nan_to_num().abs().max() + 1e-6)
            if not torch.allclose(repeated, expected, rtol=0, atol=tolerance, equal_nan=True):
                error = (repeated - expected).abs().max()
                raise ValueError(
                    "The captured graph: expected it to repeat the pair, got numbers that are off by "
                    f"{float(error):.3g}. Something other than a tensor changes between two runs: a counter, "
                    "a Python or NumPy random number, an attribute that is set again. To fix: pass it as a "
                    "tensor, or do without compiling."
                )

    def _inputs(self, pair: Pair) -> list[Tensor]:
        tensors = [tensor.detach() for tensor in self.read] + _given(pair)
        # A compiled graph reads memory, where a lazy negation or conjugation is not done yet.
        return [tensor.resolve_conj().resolve_neg() for tensor in tensors]


def _with_own_results(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Return copies of the results of a CUDA graph, which writes them into the same memory at every run.

    While an earlier result lives, torch would record the graph again instead of running it.
    """

    def run(*inputs: Tensor) -> Any:
        results = compiled(*inputs)
        copied = iter(copies(leaves(results)))
        return map_leaves(lambda _: next(copied), results)

    return run


def _capture(function: Callable[[Pair], Any], pair: Pair) -> tuple[GraphModule, list[Tensor]]:
    """Record one run below the handlers, and make every tensor that it reads an input.

    Returns:
        The graph, and what it reads besides its arguments: its first inputs.
    """
    for leaf in leaves((pair.args, pair.kwargs)):
        if not isinstance(leaf, Tensor) and (hasattr(leaf, "dtype") or isinstance(leaf, dict | list | tuple)):
            raise ValueError(
                "The batch: expected tensors, alone or in plain tuples, lists and dicts, got "
                f"{type(leaf).__name__}, whose numbers a graph would keep. To fix: use torch.as_tensor(x)."
            )
    weights = active_weights()
    betas = [weight.beta for weight in weights]

    def run(*tensors: Tensor) -> Any:
        given = iter(tensors)

        def put(leaf: Any) -> Any:
            return next(given) if isinstance(leaf, Tensor) else leaf

        args, kwargs = map_leaves(put, (pair.args, pair.kwargs))
        for weight, tensor in zip(weights, given, strict=True):
            weight.beta = tensor
        with KeepTensors():
            return function(pair.on(args, kwargs))

    record = recorder()
    try:
        with no_value_checks(), one_fake_mode():
            captured = record(run)(*_given(pair))
    except Exception as error:
        raise ValueError(
            "The pair: expected only tensor operations, the same at every step, got one that a graph "
            f"cannot capture: {_line(error)}: {_first_sentence(error)}. To fix: use torch.where for a choice "
            "by value, keep numbers in tensors, or do without compiling."
        ) from error
    finally:
        for weight, beta in zip(weights, betas, strict=True):
            weight.beta = beta
    _check_buffers(pair)
    graph = captured.graph
    for node in graph.nodes:
        if has_shape_by_value(node):
            raise ValueError(
                f"The pair: expected shapes that do not depend on values, got a graph that cannot capture "
                f"{node.target}, since it would keep the shape of the first run. To fix: use a mask "
                "(torch.where, poutine.mask) instead of a selection, or do without compiling."
            )
    # What the run read besides its arguments is in the graph as constants.
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
    simplify(graph)
    captured.recompile()
    return captured, [tensor for _, tensor in lifted.values()]


def _check_modules(pair: Pair) -> None:
    """Refuse modules of torch.compile, and those that average gradients in hooks of autograd, as DDP."""
    for module in pair.modules:
        kind = type(module)
        if is_compiled(module):
            inner = type(getattr(module, "_orig_mod", module)).__name__
            raise ValueError(
                f"Model and guide: expected no module compiled by torch.compile in a graph, got {inner}. A "
                "CompiledELBO compiles the whole step. To fix: pass the module as it was."
            )
        if any(
            base.__module__.startswith(("torch.nn.parallel", "torch.distributed")) for base in kind.__mro__
        ):
            raise ValueError(
                f"Model and guide: expected no {kind.__name__} around them in a graph, got one, which "
                "averages gradients between processes while autograd runs. A graph does not do so. To fix: "
                "pass the module inside, and average p.grad in a hook, "
                "optimizer.register_step_pre_hook(...); or do without compiling."
            )


def _check_buffers(pair: Pair) -> None:
    """Refuse a pair whose run replaced a buffer, since a graph would not do so again."""
    before = {(module, name): buffer for module, name, buffer in pair.buffers}
    for module, name, buffer in Pair(pair.model, pair.guide).buffers:
        if before.get((module, name), buffer) is not buffer:
            raise ValueError(
                f"The buffer '{name}' of {type(module).__name__}: expected it updated in place, got a new "
                "tensor in a run of the pair, which a graph would not repeat. To fix: self.buffer.copy_(...)."
            )


def _given(pair: Pair) -> list[Tensor]:
    """Return the inputs that each step brings: the tensors of the batch, and the KL weights around it."""
    given = [leaf for leaf in leaves((pair.args, pair.kwargs)) if isinstance(leaf, Tensor)]
    weights = active_weights()
    if weights:
        wide = (tensor for tensor in given if tensor.dtype in (torch.float32, torch.float64))
        like = next(wide, torch.empty(()))
        given += [_like(weight.beta, like) for weight in weights]
    # A tensor given twice, or held by the pair as well, is two inputs: next time it may be two tensors.
    return [tensor.detach().contiguous() for tensor in given]


def _like(number: Any, tensor: Tensor) -> Tensor:
    """Return a number as a tensor like another one; a copy from the CPU would wait for the GPU."""
    if isinstance(number, Tensor) and not number.is_cpu:
        return number.to(tensor)
    return tensor.new_full((), float(number))


def _contiguous(value: Any) -> Any:
    return value.contiguous() if isinstance(value, Tensor) else value


@contextmanager
def _no_autocast() -> Iterator[None]:
    """Switch autocast off: a graph contains its casts, and its float32 operations must stay in float32."""
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def _buffer_values(pair: Pair) -> list[Tensor]:
    """Return copies of the buffers as they are now."""
    buffers = (buffer for _, _, buffer in Pair(pair.model, pair.guide).buffers)
    return [buffer.clone() for buffer in buffers if buffer is not None and buffer.numel()]


def _keep_freed_memory() -> None:
    """Make glibc keep the memory of a step's intermediate tensors for the next step.

    By default glibc returns freed memory to the system, and the next step has to fetch it again, page by
    page. Once the process has freed one block about as large as this one, glibc keeps twice as much. Without
    glibc nothing happens.
    """
    torch.empty((32 << 20) - (64 << 10), dtype=torch.uint8, device="cpu")


def _first_sentence(error: BaseException) -> str:
    """Return the first sentence of an error's message."""
    return str(error).partition("\n")[0].partition(". ")[0]


def _line(error: BaseException) -> str:
    """Name the line of the user's code that an error comes from."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(_LIBRARIES)]
    frame = (own or list(frames))[-1]
    return f"{Path(frame.filename).name}, line {frame.lineno}, {frame.line!r}"
