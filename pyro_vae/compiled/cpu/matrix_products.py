"""Faster matrix products on a CPU: which library computes those of a graph, and how it needs the factors.

A step of a small VAE is mostly a dozen matrix products. Torch's first choice for them is MKL. On a processor
that has AVX-512 and is not made by Intel, MKL takes twice as long as necessary. With AVX-512, therefore,

- a replayed graph calls oneDNN, torch's second library for matrix products;
- a compiled graph calls the microkernels that oneDNN generates for small tiles of a product, from a C++
  kernel of this package (``matrix_products.cpp``). A call of oneDNN itself costs ten microseconds on top.

With AVX2 alone MKL is faster than both, and every product stays with torch.
"""

from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from pyro_vae.compiled.cpu.cpp_kernels import CppKernel, register_extern_kernel, start_compiling

_ATEN = torch.ops.aten
_ONEDNN_LINEAR = torch.ops.mkldnn._linear_pointwise.default

# A product is replaced if each side of its three matrices has at least this length.
_MIN_SIDE = 16

# On a processor with matrix instructions (AMX), torch is faster at bfloat16 products of at least this many
# multiplications.
_MIN_AMX_MULTIPLICATIONS = 1 << 27


def send_products_to_onednn(captured: GraphModule) -> GraphModule:
    """Return a copy of a graph whose float32 matrix products on a CPU are computed by oneDNN.

    OneDNN is as exact as torch's first choice. It needs a contiguous left factor. Where oneDNN is not the
    faster one on this processor, the products stay as they are.
    """
    graph = _copy_with_supported_dtypes(captured)
    if not _onednn_is_faster(torch.float32):
        return GraphModule(captured, graph)
    for node, a, b, bias in _find_products(graph, torch.float32):
        with graph.inserting_before(node):
            left = a
            if not a.meta["val"].is_contiguous():
                left = graph.call_function(
                    _ATEN.clone.default, (a,), {"memory_format": torch.contiguous_format}
                )
            # OneDNN expects b^T. If b is itself a transpose, b^T is the matrix before it.
            right = b.args[0] if b.target is _ATEN.t.default else graph.call_function(_ATEN.t.default, (b,))
            product = graph.call_function(_ONEDNN_LINEAR, (left, right, bias, "none", [], ""))
        _replace(graph, node, product)
    return GraphModule(captured, graph)


def compute_products_by_tiles(captured: GraphModule) -> GraphModule:
    """Return a copy of a graph whose matrix products on a CPU are computed tile by tile, for compilation.

    The sum of a bfloat16 product stays in float32, and is rounded once at the end. Under
    ``torch.set_float32_matmul_precision("medium")`` the factors of a float32 product are rounded to bfloat16.
    Where torch has no fast microkernel for this processor, the products stay as they are.
    """
    from torch._inductor import config

    graph = _copy_with_supported_dtypes(captured)
    if config.cpp_wrapper:  # a C++ wrapper cannot call the kernel, which is a Python function
        return GraphModule(captured, graph)
    # For each node, the number of writes into memory up to it. A rounded copy of a matrix is used again only
    # if there is no write in between, since the matrix may have changed.
    num_writes = dict(zip(graph.nodes, accumulate(map(_writes_to_memory, graph.nodes)), strict=True))
    rounded_copies: dict[tuple[Node, int], Node] = {}

    def round_to_bfloat16(matrix: Any, written: int) -> Node:
        if matrix.target is _ATEN.t.default:
            return graph.call_function(_ATEN.t.default, (round_to_bfloat16(matrix.args[0], written),))
        if (matrix, written) not in rounded_copies:
            rounded_copies[matrix, written] = _convert(graph, matrix, torch.bfloat16)
        return rounded_copies[matrix, written]

    for dtype in filter(_has_fast_microkernel, (torch.float32, torch.bfloat16)):
        for node, a, b, bias in _find_products(graph, dtype):
            depth = len(b.meta["val"])
            has_row_pairs = depth % 2 == 0  # the bfloat16 microkernel takes the rows of b in pairs
            if dtype is torch.bfloat16 and not has_row_pairs:
                continue
            round_factors = (
                dtype is torch.float32
                and float32_products_use_bfloat16()
                and _has_fast_microkernel(torch.bfloat16)
            )
            large = depth * node.meta["val"].numel() >= _MIN_AMX_MULTIPLICATIONS
            if (round_factors or dtype is torch.bfloat16) and large and torch.cpu._is_amx_tile_supported():
                continue
            with graph.inserting_before(node):
                factors = a, b
                if round_factors and has_row_pairs:
                    written = num_writes[node]
                    factors = round_to_bfloat16(a, written), round_to_bfloat16(b, written)
                product = graph.call_function(_PRODUCT_BY_TILES, factors)
                if bias is not None:
                    product = graph.call_function(_ATEN.add.Tensor, (product, bias))
                if dtype is torch.bfloat16:
                    product.meta["val"] = node.meta["val"].float()
                    product = _convert(graph, product, dtype)
            _replace(graph, node, product)
    return GraphModule(captured, graph)


def float32_products_use_bfloat16() -> bool:
    """Say whether ``torch.set_float32_matmul_precision`` allows bfloat16 in float32 products on a CPU."""
    # The public torch.backends.mkldnn.matmul.fp32_precision gives the same, but takes five times as long, and
    # this is read at every step.
    return bool(torch._C._get_fp32_precision_getter("mkldnn", "matmul") == "bf16")


def _copy_with_supported_dtypes(captured: GraphModule) -> Graph:
    """Return a copy of a graph; without bfloat16 instructions its bfloat16 products become float32 products.

    They are as exact. On such a processor torch's own bfloat16 products take 15 to 29 times as long as
    float32 products.
    """
    graph = deepcopy(captured.graph)
    products = () if _has_bfloat16_instructions() else _find_products(graph, torch.bfloat16)
    for node, *_ in products:
        with graph.inserting_before(node):
            wide = tuple(_convert(graph, cast(Node, matrix), torch.float32) for matrix in node.args)
            product = graph.call_function(cast(Any, node.target), wide)
            product.meta["val"] = node.meta["val"].float()
            _replace(graph, node, _convert(graph, product, torch.bfloat16))
    return graph


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


def _writes_to_memory(node: Node) -> bool:
    return bool(getattr(getattr(node.target, "_schema", None), "is_mutable", False))


def _convert(graph: Graph, matrix: Node, dtype: torch.dtype) -> Node:
    converted = graph.call_function(_ATEN._to_copy.default, (matrix,), {"dtype": dtype})
    converted.meta["val"] = torch.empty_like(matrix.meta["val"], dtype=dtype, device="meta")
    return converted


def _replace(graph: Graph, node: Node, product: Node) -> None:
    product.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(product)
    graph.erase_node(node)


_LIBRARY = torch.library.Library("pyro_vae", "DEF")
_LIBRARY.define("product(Tensor a, Tensor b) -> Tensor")
_PRODUCT_BY_TILES = torch.ops.pyro_vae.product.default


@torch.library.impl(_LIBRARY, "product", "Meta")
def _product_shape(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1], dtype=torch.float32)


@torch.library.impl(_LIBRARY, "product", "CPU")
def _multiply(a: Tensor, b: Tensor) -> Tensor:
    """Return a b in float32: (m, k), (k, n) -> (m, n), with both factors in float32 or both in bfloat16."""
    product = a.new_empty(a.shape[0], b.shape[1], dtype=torch.float32)
    _multiply_into(a.contiguous(), b.contiguous(), out=product)
    return product


def _multiply_into(a: Tensor, b: Tensor, *, out: Tensor) -> None:
    """Write a b into ``out``; all three are contiguous."""
    m, k = a.shape
    _kernel()(a, b, out, m, b.shape[1], k, a.dtype is torch.bfloat16)


@cache
def _kernel() -> CppKernel:
    return start_compiling("matrix_products.cpp")()


def _has_bfloat16_instructions() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _onednn_is_faster(dtype: torch.dtype) -> bool:
    """Say whether oneDNN multiplies this dtype faster than torch's first choice on this processor."""
    if dtype is torch.bfloat16:
        return torch.cpu._is_avx512_bf16_supported()
    return torch.cpu._is_avx512_supported()


@cache
def _has_fast_microkernel(dtype: torch.dtype) -> bool:
    """Try whether torch has a microkernel for this dtype here, if it would be faster than MKL."""
    if not _onednn_is_faster(dtype):
        return False
    one = torch.ones(_MIN_SIDE, _MIN_SIDE, dtype=dtype, device="cpu")
    try:
        _multiply(one, one)
    except Exception:  # no C++ compiler, another processor, torch without oneDNN: errors of many types
        return False
    return True


@cache
def register_tile_lowering() -> None:
    """Let torch's compiler call the tile kernel directly, with a result in memory that it plans.

    The kernel needs contiguous factors. Where that means to copy fewer numbers, a b is computed as the
    transpose of b^T a^T. The compiler knows the strides of the result, and adapts what reads it.
    """
    from torch._inductor import lowering
    from torch._inductor.virtualized import V

    add_kernel_call = register_extern_kernel(_multiply_into, "pyro_vae_product")

    def multiply(a: Any, b: Any) -> Any:
        return add_kernel_call((a, b), [a.get_size()[0], b.get_size()[1]])

    def transpose(matrix: Any) -> Any:
        return lowering.permute(matrix, (1, 0))

    def lower(a: Any, b: Any) -> Any:
        node: Any = V.graph.current_node
        left, right = (factor.meta["val"] for factor in node.args)
        copied = _numbers_to_copy(left) + _numbers_to_copy(right)
        copied_if_transposed = (
            _numbers_to_copy(left.t()) + _numbers_to_copy(right.t()) + node.meta["val"].numel()
        )
        is_result = any(user.op == "output" for user in node.users)
        if copied <= copied_if_transposed or is_result:
            return multiply(a, b)
        return transpose(multiply(transpose(b), transpose(a)))

    lowering.lowerings[_PRODUCT_BY_TILES] = lower


def _numbers_to_copy(matrix: Tensor) -> int:
    """Return how many numbers must be copied to make a matrix contiguous."""
    return 0 if matrix.is_contiguous() else matrix.numel()
