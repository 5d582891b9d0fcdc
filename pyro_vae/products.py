"""Matrix products on a CPU: which library computes those of a graph, and how its factors lie in memory.

A small VAE's step is mostly a dozen products, and torch's first choice for them, MKL, takes twice the time
that it could on a processor which Intel did not make. Those of a replayed graph go to oneDNN, those of a
compiled one straight to the microkernels that oneDNN generates, tile by tile (``products.cpp``): oneDNN's own
products spend ten microseconds each on the way there.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

_ATEN = torch.ops.aten
_ONEDNN = torch.ops.mkldnn._linear_pointwise.default

# The least side of a matrix whose product is worth the way.
_SMALL = 16


def by_onednn(captured: GraphModule) -> GraphModule:
    """Send a graph's float32 matrix products on a CPU to oneDNN, in place of torch's first choice.

    What oneDNN computes is as exact. It takes a product's left side row by row.
    """
    graph = deepcopy(captured.graph)
    for node, a, b, bias in _products(graph, torch.float32):
        with graph.inserting_before(node):
            factors = _row_by_row(graph, a), _transposed(graph, b)
            product = graph.call_function(_ONEDNN, (*factors, bias, "none", [], ""))
        node.replace_all_uses_with(product)
        graph.erase_node(node)
    return GraphModule(captured, graph)


def by_tiles(captured: GraphModule) -> GraphModule:
    """Let a graph that is going to be compiled compute its matrix products on a CPU tile by tile.

    Those of bfloat16 are rounded at most once, where they are done. Under
    ``torch.set_float32_matmul_precision("medium")`` the factors of those of float32 are rounded to bfloat16.
    What torch has no microkernel for on this processor stays as it is.
    """
    graph = deepcopy(captured.graph)
    for dtype in filter(_has_microkernel, (torch.float32, torch.bfloat16)):
        for node, a, b, bias in _products(graph, dtype):
            left, right, value = (each.meta["val"] for each in (a, b, node))
            inside = dtype
            if rounds_float32() and _has_microkernel(torch.bfloat16):
                inside = torch.bfloat16
            if len(right) % 2:  # the microkernel of bfloat16 takes rows in pairs
                if dtype is torch.bfloat16:
                    continue
                inside = torch.float32
            # How many numbers have to be moved for a b, whose factors lie row by row, and for (b^T a^T)^T.
            straight = _to_move(left) + _to_move(right)
            flipped = _to_move(left.t()) + _to_move(right.t()) + value.numel()
            flip = flipped < straight and not _is_result(node)
            with graph.inserting_before(node):
                pair = (_transposed(graph, b), _transposed(graph, a)) if flip else (a, b)
                factors = [_row_by_row(graph, factor) for factor in pair]
                if inside is not dtype:
                    factors = [_converted(graph, factor, inside) for factor in factors]
                product = graph.call_function(_TILES, (*factors,))
                if flip:
                    product = graph.call_function(_ATEN.t.default, (product,))
                if bias is not None:
                    product = graph.call_function(_ATEN.add.Tensor, (product, bias))
                for user in [*node.users]:
                    if user.target is _ATEN._to_copy.default and user.kwargs.get("dtype") is torch.float32:
                        user.replace_all_uses_with(product)
                        graph.erase_node(user)
                if dtype is torch.bfloat16 and node.users:
                    product = _converted(graph, product, dtype)
            product.meta["val"] = value.new_empty_strided(value.shape, (1, len(value))) if flip else value
            node.replace_all_uses_with(product)
            graph.erase_node(node)
    return GraphModule(captured, graph)


def rounds_float32() -> bool:
    """Say whether ``torch.set_float32_matmul_precision`` allows bfloat16 in float32 products on a CPU."""
    mkldnn: Any = torch.backends.mkldnn
    return bool(mkldnn.matmul.fp32_precision == "bf16")


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


def _is_result(node: Node) -> bool:
    """Say whether a graph returns a product, as it is or converted: it then has to lie as it was captured."""
    later = (user for each in (node, *node.users) for user in each.users)
    return any(user.op == "output" for user in later)


def _transposed(graph: Graph, matrix: Node) -> Node:
    if matrix.target is _ATEN.t.default:
        return cast(Node, matrix.args[0])
    transposed = graph.call_function(_ATEN.t.default, (matrix,))
    transposed.meta["val"] = matrix.meta["val"].t()
    return transposed


def _row_by_row(graph: Graph, matrix: Node) -> Node:
    if matrix.meta["val"].is_contiguous():
        return matrix
    return graph.call_function(_ATEN.clone.default, (matrix,), {"memory_format": torch.contiguous_format})


def _converted(graph: Graph, matrix: Node, dtype: torch.dtype) -> Node:
    return graph.call_function(_ATEN._to_copy.default, (matrix,), {"dtype": dtype})


def _to_move(matrix: Tensor) -> int:
    return 0 if matrix.is_contiguous() else matrix.numel()


_LIBRARY = torch.library.Library("pyro_vae", "DEF")
_LIBRARY.define("product(Tensor a, Tensor b) -> Tensor")
_TILES = torch.ops.pyro_vae.product.default


@torch.library.impl(_LIBRARY, "product", "Meta")
def _product_shape(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1], dtype=torch.float32)


@torch.library.impl(_LIBRARY, "product", "CPU")
def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return a b in float32: (m, k) by (k, n), both float32 or both bfloat16, row by row in memory."""
    product = a.new_empty(a.shape[0], b.shape[1], dtype=torch.float32)
    _product_into(a, b, out=product)
    return product


def _product_into(a: Tensor, b: Tensor, *, out: Tensor) -> None:
    m, k = a.shape
    _kernel()(a, b, out, m, b.shape[1], k, a.dtype is torch.bfloat16)


@cache
def _kernel() -> Callable[..., None]:
    from torch._inductor import codecache, config  # slow to import

    source = Path(__file__).with_suffix(".cpp").read_text()
    types = ["const void*", "const void*", "float*", *["int64_t"] * 4]
    # Neither torch's headers nor vectors of its own are used: both take seconds to get ready.
    with config.patch({"cpp_cache_precompile_headers": False, "cpp.vec_isa_ok": True}):
        kernel: Callable[..., None] = codecache.CppPythonBindingsCodeCache.load_pybinding(types, source)
    return kernel


@cache
def _has_microkernel(dtype: torch.dtype) -> bool:
    """Say whether torch can multiply by tiles here, and fast: by trying."""
    fast = (
        torch.cpu._is_avx512_bf16_supported() if dtype is torch.bfloat16 else torch.cpu._is_avx2_supported()
    )
    if not fast:
        return False
    one = torch.ones(_SMALL, _SMALL, dtype=dtype, device="cpu")
    try:
        _product(one, one)
    except Exception:  # no C++ compiler, another processor, a torch built without oneDNN: many kinds of error
        return False
    return True


@cache
def lower_tiles() -> None:
    """Let torch's compiler call the kernel itself, not the operation, and into memory that it plans."""
    from torch._inductor import ir, lowering
    from torch._inductor.select_algorithm import ExternKernelChoice

    kernel = ExternKernelChoice(_product_into, name="pyro_vae_product")

    def lower(a: Any, b: Any) -> Any:
        factors = [ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(each)) for each in (a, b)]
        layout = ir.FixedLayout(a.get_device(), torch.float32, [a.get_size()[0], b.get_size()[1]])
        return kernel.bind(factors, layout).output_node()

    lowering.lowerings[_TILES] = lower
