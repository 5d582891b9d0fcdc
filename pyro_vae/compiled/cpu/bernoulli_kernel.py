"""Compute a compiled graph's Bernoulli log probability and its derivative in one pass over the pixels.

Torch's compiler makes two passes, one for each, and calls a function for the exponential in both. The C++
kernel ``bernoulli_kernel.cpp`` computes both from one exponential, without a call.
"""

import math
import operator
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import deepcopy
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

from pyro_vae.compiled.cpu.cpp_kernels import CppKernel, register_extern_kernel, start_compiling
from pyro_vae.distributions.densities import SumOfLogProbs

_ATEN = torch.ops.aten


def compute_bernoulli_in_one_pass(captured: GraphModule) -> GraphModule:
    """Return a copy of a graph that computes float32 Bernoulli likelihoods on a CPU by the kernel.

    Nodes whose result is no longer used stay in the graph; torch's compiler drops them.
    """
    from torch._inductor import config

    graph = deepcopy(captured.graph)
    if not config.cpp_wrapper and _kernel_compiles():  # a C++ wrapper cannot call the kernel
        written = _written_nodes(graph)
        for x, logits in list(_find_likelihoods(graph)):
            if _memory_owner(x) in written or _memory_owner(logits) in written:
                continue  # they may have changed when the derivative is computed
            totals = _find_occurrences(graph, SumOfLogProbs.forward, x, logits)
            slopes = _find_occurrences(graph, SumOfLogProbs.slope, x, logits)
            if totals:
                _replace_by_kernel(graph, x, logits, totals, slopes)
    return GraphModule(captured, graph)


def _find_likelihoods(graph: Graph) -> Iterator[tuple[Any, Any]]:
    """Yield the pixels x and logits l of each (1 - 2 x) l in a graph."""
    node: Any
    for node in graph.nodes:
        if node.target is _ATEN.mul.Tensor and getattr(node.args[0], "target", None) is _ATEN.rsub.Scalar:
            x, logits = node.args[0].args[0], node.args[1]
            values = [getattr(each, "meta", {}).get("val") for each in (x, logits)]
            if all(isinstance(v, Tensor) and v.is_cpu and v.dtype is torch.float32 for v in values):
                yield x, logits


def _memory_owner(node: Any) -> Any:
    """Return the node that owns the memory of a node's result."""
    while node.target is operator.getitem or any(a.alias_info is not None for a in _arguments(node)[:1]):
        node = node.args[0]
    return node


def _written_nodes(graph: Graph) -> set[Node]:
    """Return the nodes whose memory some node of the graph writes into."""
    written = []
    for node in graph.nodes:
        arguments = {argument.name: argument.alias_info for argument in _arguments(node)}
        given = {**dict(zip(arguments, node.args, strict=False)), **node.kwargs}
        written += [given.get(name) for name, alias in arguments.items() if alias and alias.is_write]
    return {_memory_owner(node) for node in tree_leaves(written) if isinstance(node, Node)}


def _arguments(node: Node) -> list[Any]:
    schema = getattr(node.target, "_schema", None)
    return [] if schema is None else schema.arguments


def _find_occurrences(graph: Graph, function: Callable[..., Tensor], *inputs: Node) -> list[Node]:
    """Return the nodes of a graph that compute ``function(*inputs)``."""
    values = (torch.empty(each.meta["val"].shape, device="meta") for each in inputs)
    *placeholders, result = (
        node.args[0] if node.op == "output" else node
        for node in make_fx(function)(*values).graph.nodes
        if node.op in ("placeholder", "output")
    )
    known = dict(zip(placeholders, inputs, strict=True))

    def same(pattern: Any, node: Any) -> bool:
        if not isinstance(pattern, Node) or not isinstance(node, Node):
            return bool(pattern == node)
        if pattern in known:
            return node is known[pattern]
        return (
            (node.target, node.kwargs, len(node.args)) == (pattern.target, pattern.kwargs, len(pattern.args))
        ) and all(map(same, pattern.args, node.args))

    return [node for node in graph.nodes if same(result, node)]


def _replace_by_kernel(graph: Graph, x: Any, logits: Any, totals: list[Node], slopes: list[Node]) -> None:
    pixels, shape = x, logits.meta["val"].shape
    if x.target is _ATEN.expand.default:  # each image has several rows of logits
        few = x.args[0].meta["val"].shape
        if shape[len(shape) - len(few) :] == few:
            pixels = x.args[0]
    rows = shape[:-1].numel()
    with graph.inserting_before(totals[0]):  # the derivative comes later in the graph
        both = graph.call_function(_TOTALS_AND_SLOPES, (pixels, logits, bool(slopes)))
        for nodes, start, end in ((totals, 0, rows), (slopes, rows, rows + shape.numel())):
            for node in nodes:
                part = graph.call_function(_ATEN.slice.Tensor, (both, 0, start, end))
                part = graph.call_function(_ATEN.view.default, (part, list(node.meta["val"].shape)))
                part.meta["val"] = node.meta["val"]
                node.replace_all_uses_with(part)


_LIBRARY = torch.library.Library("pyro_vae", "FRAGMENT")
_LIBRARY.define("bernoulli(Tensor x, Tensor logits, bool slopes) -> Tensor")
_TOTALS_AND_SLOPES = torch.ops.pyro_vae.bernoulli.default


@torch.library.impl(_LIBRARY, "bernoulli", "Meta")
def _result_shape(x: Tensor, logits: Tensor, slopes: bool) -> Tensor:
    return logits.new_empty(_result_size(logits.shape, slopes))


@torch.library.impl(_LIBRARY, "bernoulli", "CPU")
def _bernoulli(x: Tensor, logits: Tensor, slopes: bool) -> Tensor:
    """Return the log probability of each row of logits, followed by its slopes if requested, in one vector.

    All numbers are float32. The shape of x is that of the last dimensions of logits.
    """
    out = logits.new_empty(_result_size(logits.shape, slopes))
    _write_totals_and_slopes(x.contiguous(), logits.contiguous(), out=out)
    return out


def _write_totals_and_slopes(x: Tensor, logits: Tensor, *, out: Tensor) -> None:
    """Write the result into ``out``, with slopes if ``out`` has room for them; all three are contiguous."""
    *batch, size = logits.shape
    rows = math.prod(batch)
    _kernel()(x, logits, out, rows, size, math.prod(x.shape[:-1]), out.numel() > rows)


def _result_size(shape: Any, slopes: bool) -> int:
    *batch, size = shape
    return math.prod(batch) * (1 + size if slopes else 1)


@cache
def _kernel() -> CppKernel:
    return start_compiling("bernoulli_kernel.cpp")()


@cache
def _kernel_compiles() -> bool:
    try:
        _kernel()
    except ValueError:  # for example a C++ compiler without vector types
        return False
    return True


@cache
def register_bernoulli_lowering() -> None:
    """Let torch's compiler call the kernel directly, with a result in memory that it plans."""
    with suppress(ValueError):
        start_compiling("bernoulli_kernel.cpp")  # compiles while the imports below run
    from torch._inductor import lowering

    add_kernel_call = register_extern_kernel(_write_totals_and_slopes, "pyro_vae_bernoulli")

    def lower(x: Any, logits: Any, slopes: bool) -> Any:
        return add_kernel_call((x, logits), [_result_size(logits.get_size(), slopes)])

    lowering.lowerings[_TOTALS_AND_SLOPES] = lower
