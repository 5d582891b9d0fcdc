"""The Bernoulli likelihood of a graph that is compiled: one pass over the pixels, by a loop of our own.

Torch's compiler takes two, one for the log probability and one for its derivative, and an exponential in each
by a function that it calls for every vector. ``bernoulli.cpp`` has both of one exponential, in line.
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

from pyro_vae.compiled.cpu.cpp import Kernel, begin, call_into
from pyro_vae.distributions.densities import SumOfLogProbs

_ATEN = torch.ops.aten


def in_one_pass(captured: GraphModule) -> GraphModule:
    """Let a graph that is going to be compiled go over float32 Bernoulli pixels on a CPU once.

    What nothing asks for any more stays in the graph, for torch's compiler to drop.
    """
    from torch._inductor import config

    graph = deepcopy(captured.graph)
    if not config.cpp_wrapper and _has_kernel():  # the wrapper has no way to call the kernel
        written = _written(graph)
        for x, logits in list(_likelihoods(graph)):
            if _origin(x) in written or _origin(logits) in written:
                continue  # they may be others when the derivative is taken
            totals = _occurrences(graph, SumOfLogProbs.forward, x, logits)
            slopes = _occurrences(graph, SumOfLogProbs.slope, x, logits)
            if totals:
                _replace(graph, x, logits, totals, slopes)
    return GraphModule(captured, graph)


def _likelihoods(graph: Graph) -> Iterator[tuple[Any, Any]]:
    """Pixels and logits that meet in (1 - 2 x) l."""
    node: Any
    for node in graph.nodes:
        if node.target is _ATEN.mul.Tensor and getattr(node.args[0], "target", None) is _ATEN.rsub.Scalar:
            x, logits = node.args[0].args[0], node.args[1]
            values = [getattr(each, "meta", {}).get("val") for each in (x, logits)]
            if all(isinstance(v, Tensor) and v.is_cpu and v.dtype is torch.float32 for v in values):
                yield x, logits


def _origin(node: Any) -> Any:
    """Return the node in whose memory another's result lies."""
    while node.target is operator.getitem or any(a.alias_info is not None for a in _arguments(node)[:1]):
        node = node.args[0]
    return node


def _written(graph: Graph) -> set[Node]:
    """The nodes whose memory is written into later."""
    written = []
    for node in graph.nodes:
        arguments = {argument.name: argument.alias_info for argument in _arguments(node)}
        given = {**dict(zip(arguments, node.args, strict=False)), **node.kwargs}
        written += [given.get(name) for name, alias in arguments.items() if alias and alias.is_write]
    return {_origin(node) for node in tree_leaves(written) if isinstance(node, Node)}


def _arguments(node: Node) -> list[Any]:
    schema = getattr(node.target, "_schema", None)
    return [] if schema is None else schema.arguments


def _occurrences(graph: Graph, function: Callable[..., Tensor], *inputs: Node) -> list[Node]:
    """Return the nodes of a graph that are what the function returns for inputs."""
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


def _replace(graph: Graph, x: Any, logits: Any, totals: list[Node], slopes: list[Node]) -> None:
    pixels, shape = x, logits.meta["val"].shape
    if x.target is _ATEN.expand.default:  # images that serve several logits each
        few = x.args[0].meta["val"].shape
        if shape[len(shape) - len(few) :] == few:
            pixels = x.args[0]
    rows = shape[:-1].numel()
    with graph.inserting_before(totals[0]):  # a derivative comes after it
        both = graph.call_function(_BOTH, (pixels, logits, bool(slopes)))
        for nodes, start, end in ((totals, 0, rows), (slopes, rows, rows + shape.numel())):
            for node in nodes:
                part = graph.call_function(_ATEN.slice.Tensor, (both, 0, start, end))
                part = graph.call_function(_ATEN.view.default, (part, list(node.meta["val"].shape)))
                part.meta["val"] = node.meta["val"]
                node.replace_all_uses_with(part)


_LIBRARY = torch.library.Library("pyro_vae", "FRAGMENT")
_LIBRARY.define("bernoulli(Tensor x, Tensor logits, bool slopes) -> Tensor")
_BOTH = torch.ops.pyro_vae.bernoulli.default


@torch.library.impl(_LIBRARY, "bernoulli", "Meta")
def _shape(x: Tensor, logits: Tensor, slopes: bool) -> Tensor:
    return logits.new_empty(_size(logits.shape, slopes))


@torch.library.impl(_LIBRARY, "bernoulli", "CPU")
def _bernoulli(x: Tensor, logits: Tensor, slopes: bool) -> Tensor:
    """Return the log probability of each row of logits and, if asked for, then its slopes, all in a row.

    All is float32; x has as many dimensions at the end as it has.
    """
    out = logits.new_empty(_size(logits.shape, slopes))
    _bernoulli_into(x.contiguous(), logits.contiguous(), out=out)
    return out


def _bernoulli_into(x: Tensor, logits: Tensor, *, out: Tensor) -> None:
    """As the operation, with slopes if they have a place in out; x, logits and out lie row by row."""
    *batch, size = logits.shape
    rows = math.prod(batch)
    _kernel()(x, logits, out, rows, size, math.prod(x.shape[:-1]), out.numel() > rows)


def _size(shape: Any, slopes: bool) -> int:
    *batch, size = shape
    return math.prod(batch) * (1 + size if slopes else 1)


@cache
def _kernel() -> Kernel:
    return begin("bernoulli.cpp")()


@cache
def _has_kernel() -> bool:
    try:
        _kernel()
    except ValueError:  # a C++ compiler that knows no vectors
        return False
    return True


@cache
def lower_bernoulli() -> None:
    """Let torch's compiler call the kernel itself, not the operation, and into memory that it plans."""
    with suppress(ValueError):
        begin("bernoulli.cpp")  # and meanwhile import
    from torch._inductor import lowering

    call = call_into(_bernoulli_into, "pyro_vae_bernoulli")

    def lower(x: Any, logits: Any, slopes: bool) -> Any:
        return call((x, logits), [_size(logits.get_size(), slopes)])

    lowering.lowerings[_BOTH] = lower
