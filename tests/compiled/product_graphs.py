"""What the tests of matrix products and other kernels share: graphs, processors, precisions and threads."""

from contextlib import contextmanager

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_vae.compiled.cpu import matrix_products
from pyro_vae.compiled.cpu.matrix_products import compute_products_by_tiles, send_products_to_onednn


def onednn_multiplies(dtype):
    """Whether oneDNN multiplies this dtype here, faster than torch's first choice or not."""
    return dtype is torch.float32 or torch.cpu._is_avx512_bf16_supported()


@contextmanager
def assume_onednn_faster(where):
    """Let `where(dtype)` say whether oneDNN multiplies a dtype faster than torch's first choice."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matrix_products, "_onednn_is_faster", where)
        matrix_products._has_fast_microkernel.cache_clear()
        yield patch
    matrix_products._has_fast_microkernel.cache_clear()


with assume_onednn_faster(onednn_multiplies):
    needs_tiles = pytest.mark.skipif(
        not matrix_products._has_fast_microkernel(torch.float32),
        reason="no C++ compiler, or a processor without AVX2",
    )
    needs_bfloat16_tiles = pytest.mark.skipif(
        not matrix_products._has_fast_microkernel(torch.bfloat16),
        reason="a processor that does not multiply bfloat16",
    )
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=needs_bfloat16_tiles)]
BOTH_WAYS = [send_products_to_onednn, pytest.param(compute_products_by_tiles, marks=needs_tiles)]


@contextmanager
def num_threads(number):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def medium_precision():
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


def targets(module):
    return [str(node.target) for node in module.graph.nodes if node.op == "call_function"]


def count_calls(module, name):
    return sum(name in target for target in targets(module))


def count_products(module, send):
    """The products of a graph that go where `send` sends them."""
    return count_calls(module, "_linear_pointwise" if send is send_products_to_onednn else "pyro_vae.product")


def error_bound(a, b, epsilon):
    """A bound on the rounding error of each number of a b, for a sum of k products in any order."""
    return 2 * a.shape[1] * epsilon * (a.double().abs() @ b.double().abs())


def capture(function, *inputs):
    return make_fx(function)(*inputs)


def random_matrix(rows, columns, by_row):
    return torch.randn(rows, columns) if by_row else torch.randn(columns, rows).t()


def many_products(x, v, w):
    """Products whose results are used, seen, written to and returned in many ways."""
    h = x @ v.t()
    seen = (x @ v.t()).relu().view(-1).sin()  # a view needs this matrix in its own order
    written = x @ v.t()
    written[:, :8] = 5.0
    first, second = (h.float() for _ in range(2))
    first.add_(1)
    return [
        h,
        seen,
        written.float(),
        first,
        second,
        (h.sin() @ w.t()).cos(),
        (v.t() @ w.t()) * 2 * 3 + 1,  # a product that is used after other operations
        (x.t() @ h[:, 8:72]).exp(),
        torch.addmm(w[:, 0], x[::2], w.t()[:64]),
        x @ x[:1].expand(24, -1).t(),
    ]
