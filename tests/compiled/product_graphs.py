"""What the tests of matrix products share: graphs, processors, precisions."""

from contextlib import contextmanager

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_vae.compiled import products
from pyro_vae.compiled.internals import onednn_linear

needs_onednn = pytest.mark.skipif(onednn_linear() is None, reason="a torch without oneDNN")


@contextmanager
def assume_onednn_faster(faster):
    """Say whether oneDNN multiplies float32 faster than torch's first choice."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "_onednn_is_faster", lambda: faster)
        yield patch


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
