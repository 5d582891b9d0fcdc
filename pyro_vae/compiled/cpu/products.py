"""Matrix products on a CPU: which library computes those of a graph, and how its factors lie in memory.

A small VAE's step is mostly a dozen products. On a processor with AVX-512 that Intel did not make, torch's
first choice for them, MKL, takes twice the time that it could. With AVX-512 those of a replayed graph go
therefore to oneDNN, those of a compiled one straight to the microkernels that oneDNN generates, tile by tile
(``products.cpp``): oneDNN's own products spend ten microseconds each on the way there. With AVX2 alone MKL is
ahead of both.
"""

from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from pyro_vae.compiled.cpu.cpp import Kernel, begin, call_into

_ATEN = torch.ops.aten
_ONEDNN = torch.ops.mkldnn._linear_pointwise.default

# The least side of a matrix whose product is worth the way.
_SMALL = 16

# So many multiplications of bfloat16 are left to torch by a processor that multiplies whole matrices (AMX).
_LARGE = 1 << 27


def by_onednn(captured: GraphModule) -> GraphModule:
    """Send a graph's float32 matrix products on a CPU to oneDNN, in place of torch's first choice.

    What oneDNN computes is as exact. It takes a product's left side row by row.
    """
    graph = _copy(captured)
    if not _is_ahead(torch.float32):
        return GraphModule(captured, graph)
    for node, a, b, bias in _products(graph, torch.float32):
        with graph.inserting_before(node):
            left = a
            if not a.meta["val"].is_contiguous():
                left = graph.call_function(
                    _ATEN.clone.default, (a,), {"memory_format": torch.contiguous_format}
                )
            # It asks for b^T, which is there where b is a transpose itself.
            right = b.args[0] if b.target is _ATEN.t.default else graph.call_function(_ATEN.t.default, (b,))
            product = graph.call_function(_ONEDNN, (left, right, bias, "none", [], ""))
        _replace(graph, node, product)
    return GraphModule(captured, graph)


def by_tiles(captured: GraphModule) -> GraphModule:
    """Let a graph that is going to be compiled compute its matrix products on a CPU tile by tile.

    Those of bfloat16 stay float32 until they are done with. Under
    ``torch.set_float32_matmul_precision("medium")`` the factors of those of float32 are rounded to bfloat16.
    What torch has no fast microkernel for on this processor stays as it is.
    """
    from torch._inductor import config

    graph = _copy(captured)
    if config.cpp_wrapper:  # which has no way to call the kernel
        return GraphModule(captured, graph)
    # So many writes come before each node. A matrix that was rounded before one of them may have changed.
    writes = dict(zip(graph.nodes, accumulate(map(_writes, graph.nodes)), strict=True))
    known: dict[tuple[Node, int], Node] = {}

    def rounded(matrix: Any, written: int) -> Node:
        if matrix.target is _ATEN.t.default:
            return graph.call_function(_ATEN.t.default, (rounded(matrix.args[0], written),))
        if (matrix, written) not in known:
            known[matrix, written] = _converted(graph, matrix, torch.bfloat16)
        return known[matrix, written]

    for dtype in filter(_has_microkernel, (torch.float32, torch.bfloat16)):
        for node, a, b, bias in _products(graph, dtype):
            depth = len(b.meta["val"])
            in_pairs = depth % 2 == 0  # as the microkernel of bfloat16 takes rows
            if dtype is torch.bfloat16 and not in_pairs:
                continue
            medium = dtype is torch.float32 and rounds_float32() and _has_microkernel(torch.bfloat16)
            large = depth * node.meta["val"].numel() >= _LARGE
            if (medium or dtype is torch.bfloat16) and large and torch.cpu._is_amx_tile_supported():
                continue
            with graph.inserting_before(node):
                factors = a, b
                if medium and in_pairs:
                    factors = rounded(a, writes[node]), rounded(b, writes[node])
                product = graph.call_function(_TILES, factors)
                if bias is not None:
                    product = graph.call_function(_ATEN.add.Tensor, (product, bias))
                if dtype is torch.bfloat16:
                    product.meta["val"] = node.meta["val"].float()
                    product = _converted(graph, product, dtype)
            _replace(graph, node, product)
    return GraphModule(captured, graph)


def _copy(captured: GraphModule) -> Graph:
    """Return a graph's copy, where products of bfloat16 are float32's on a processor that has no such.

    They are as exact. Torch's own take 15 to 29 times as long as float32's there.
    """
    graph = deepcopy(captured.graph)
    reduced = () if _has_bfloat16() else _products(graph, torch.bfloat16)
    for node, *_ in reduced:
        with graph.inserting_before(node):
            wide = tuple(_converted(graph, cast(Node, matrix), torch.float32) for matrix in node.args)
            product = graph.call_function(cast(Any, node.target), wide)
            product.meta["val"] = node.meta["val"].float()
            _replace(graph, node, _converted(graph, product, torch.bfloat16))
    return graph


def rounds_float32() -> bool:
    """Say whether ``torch.set_float32_matmul_precision`` allows bfloat16 in float32 products on a CPU."""
    # As torch.backends.mkldnn.matmul.fp32_precision, which costs five times as much, at every step.
    return bool(torch._C._get_fp32_precision_getter("mkldnn", "matmul") == "bf16")


def _products(graph: Graph, dtype: torch.dtype) -> Iterator[tuple[Node, Node, Node, Node | None]]:
    """The products on a CPU that are worth it: the node, both factors, and what is added to each row."""
    for node in list(graph.nodes):
        if node.target in (_ATEN.mm.default, _ATEN.addmm.default) and not node.kwargs:
            *added, a, b = node.args
            bias = added[0] if added else None
            value = node.meta["val"]
            large = min(*value.shape, len(b.meta["val"])) >= _SMALL
            spread = bias is not None and bias.meta["val"].shape != value.shape[1:]
            if large and not spread and value.device.type == "cpu" and value.dtype == dtype:
                yield node, a, b, bias


def _writes(node: Node) -> bool:
    return bool(getattr(getattr(node.target, "_schema", None), "is_mutable", False))


def _converted(graph: Graph, matrix: Node, dtype: torch.dtype) -> Node:
    converted = graph.call_function(_ATEN._to_copy.default, (matrix,), {"dtype": dtype})
    converted.meta["val"] = torch.empty_like(matrix.meta["val"], dtype=dtype, device="meta")
    return converted


def _replace(graph: Graph, node: Node, product: Node) -> None:
    product.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(product)
    graph.erase_node(node)


_LIBRARY = torch.library.Library("pyro_vae", "DEF")
_LIBRARY.define("product(Tensor a, Tensor b) -> Tensor")
_TILES = torch.ops.pyro_vae.product.default


@torch.library.impl(_LIBRARY, "product", "Meta")
def _product_shape(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1], dtype=torch.float32)


@torch.library.impl(_LIBRARY, "product", "CPU")
def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return a b in float32: (m, k) by (k, n), both float32 or both bfloat16."""
    product = a.new_empty(a.shape[0], b.shape[1], dtype=torch.float32)
    _product_into(a.contiguous(), b.contiguous(), out=product)
    return product


def _product_into(a: Tensor, b: Tensor, *, out: Tensor) -> None:
    """As the operation; a, b and out lie row by row."""
    m, k = a.shape
    _kernel()(a, b, out, m, b.shape[1], k, a.dtype is torch.bfloat16)


@cache
def _kernel() -> Kernel:
    return begin("products.cpp")()


def _has_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _is_ahead(dtype: torch.dtype) -> bool:
    """Say whether oneDNN multiplies these numbers faster than torch's first choice on this processor."""
    if dtype is torch.bfloat16:
        return torch.cpu._is_avx512_bf16_supported()
    return torch.cpu._is_avx512_supported()


@cache
def _has_microkernel(dtype: torch.dtype) -> bool:
    """Say whether torch can multiply by tiles here, and fast: by trying."""
    if not _is_ahead(dtype):
        return False
    one = torch.ones(_SMALL, _SMALL, dtype=dtype, device="cpu")
    try:
        _product(one, one)
    except Exception:  # no C++ compiler, another processor, a torch built without oneDNN: many kinds of error
        return False
    return True


@cache
def lower_tiles() -> None:
    """Let torch's compiler call the kernel itself, not the operation, and into memory that it plans.

    The kernel takes its factors row by row: where fewer numbers have to be moved for it, a b is computed as
    the transpose of b^T a^T. The compiler sees to it that whoever asks finds it lying as it should.
    """
    from torch._inductor import lowering
    from torch._inductor.virtualized import V

    call_kernel = call_into(_product_into, "pyro_vae_product")

    def call(a: Any, b: Any) -> Any:
        return call_kernel((a, b), [a.get_size()[0], b.get_size()[1]])

    def transpose(matrix: Any) -> Any:
        return lowering.permute(matrix, (1, 0))

    def lower(a: Any, b: Any) -> Any:
        node: Any = V.graph.current_node
        left, right = (factor.meta["val"] for factor in node.args)
        straight = _to_move(left) + _to_move(right)
        flipped = _to_move(left.t()) + _to_move(right.t()) + node.meta["val"].numel()
        is_result = any(user.op == "output" for user in node.users)
        return call(a, b) if straight <= flipped or is_result else transpose(call(transpose(b), transpose(a)))

    lowering.lowerings[_TILES] = lower


def _to_move(matrix: Tensor) -> int:
    """Return how many numbers have to be moved until a matrix lies row by row."""
    return 0 if matrix.is_contiguous() else matrix.numel()
