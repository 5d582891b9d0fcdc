"""Products: the matrix products of a graph on a CPU, by the faster library and the faster dtype.

A step of a small VAE is mostly a dozen matrix products. Torch's first choice for them is MKL. On a processor
that has AVX-512 and is not made by Intel, MKL takes up to twice as long as oneDNN, torch's second library. On
a processor without instructions for bfloat16, products of it take 15 to 29 times as long as those of float32.
"""

from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from pyro_vae.compiled.internals import multiplies_bfloat16, onednn_linear

_ATEN = torch.ops.aten

# A product is replaced if each side of its three matrices has at least this length.
_MIN_SIDE = 16

_LIBRARY = torch.library.Library("pyro_vae", "DEF")
_LIBRARY.define("linear(Tensor a, Tensor b, Tensor? bias) -> Tensor")
_LINEAR = torch.ops.pyro_vae.linear.default


@torch.library.impl(_LIBRARY, "linear", "Meta")
def _shape(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[0])


@torch.library.impl(_LIBRARY, "linear", "CPU")
def linear_by_onednn(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """Return a b^T + bias in float32: (m, k), (n, k), (n,) -> (m, n). a is contiguous."""
    product: Tensor = onednn_linear()(a, b, bias, "none", [], "")
    return product


def choose_products(captured: GraphModule) -> GraphModule:
    """Return a copy of a graph whose products on a CPU take the fastest way that is as exact.

    Products of float32 go to oneDNN if that is the faster library. If the processor does not multiply
    bfloat16, products of bfloat16 become float32 products of the same factors.
    """
    graph = deepcopy(captured.graph)
    if not multiplies_bfloat16():
        for node, *_ in _find_products(graph, torch.bfloat16):
            with graph.inserting_before(node):
                wide = tuple(_convert(graph, cast(Node, matrix), torch.float32) for matrix in node.args)
                product = graph.call_function(cast(Any, node.target), wide)
                product.meta["val"] = node.meta["val"].float()
                _replace(graph, node, _convert(graph, product, torch.bfloat16))
    if _onednn_is_faster():
        for node, a, b, bias in _find_products(graph, torch.float32):
            with graph.inserting_before(node):
                left = a
                if not a.meta["val"].is_contiguous():
                    left = graph.call_function(
                        _ATEN.clone.default, (a,), {"memory_format": torch.contiguous_format}
                    )
                # If b is itself a transpose, b^T is the matrix before it.
                is_transpose = b.target is _ATEN.t.default
                right = b.args[0] if is_transpose else graph.call_function(_ATEN.t.default, (b,))
                product = graph.call_function(_LINEAR, (left, right, bias))
            _replace(graph, node, product)
    return GraphModule(captured, graph)


@cache
def _onednn_is_faster() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and onednn_linear() is not None


def _find_products(graph: Graph, dtype: torch.dtype) -> Iterator[tuple[Node, Node, Node, Node | None]]:
    """Yield the products on a CPU that can be replaced: the node, its two factors, and its bias or None."""
    for node in list(graph.nodes):
        if node.target in (_ATEN.mm.default, _ATEN.addmm.default) and not node.kwargs:
            *added, a, b = node.args
            bias = added[0] if added else None
            value = node.meta["val"]
            large_enough = min(*value.shape, len(b.meta["val"])) >= _MIN_SIDE
            bias_is_row = bias is None or bias.meta["val"].shape == value.shape[1:]
            if large_enough and bias_is_row and value.device.type == "cpu" and value.dtype == dtype:
                yield node, a, b, bias


def _convert(graph: Graph, matrix: Node, dtype: torch.dtype) -> Node:
    converted = graph.call_function(_ATEN._to_copy.default, (matrix,), {"dtype": dtype})
    converted.meta["val"] = torch.empty_like(matrix.meta["val"], dtype=dtype, device="meta")
    return converted


def _replace(graph: Graph, node: Node, product: Node) -> None:
    product.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(product)
    graph.erase_node(node)
