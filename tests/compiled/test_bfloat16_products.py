"""Products of bfloat16, and of float32 rounded to it: which are replaced, and what is rounded when."""

from contextlib import nullcontext

import pytest
import torch
from compiled_steps import compiles
from product_graphs import (
    BOTH_WAYS,
    assume_onednn_faster,
    capture,
    count_calls,
    count_products,
    error_bound,
    many_products,
    medium_precision,
    needs_bfloat16_tiles,
    needs_tiles,
    random_matrix,
    targets,
)
from pyro.infer import Trace_ELBO
from registry import data, pair
from torch._inductor.utils import run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode

import pyro_vae as pv
from pyro_vae.compiled.cpu import matrix_products
from pyro_vae.compiled.cpu.matrix_products import compute_products_by_tiles

pytestmark = pytest.mark.usefixtures("products_replaced_everywhere")


@pytest.fixture
def without_bfloat16(products_replaced_everywhere):
    """A processor that does not multiply bfloat16."""
    with assume_onednn_faster(lambda dtype: dtype is torch.float32) as patch:
        patch.setattr(matrix_products, "_has_bfloat16_instructions", lambda: False)
        yield


@pytest.mark.parametrize("send", BOTH_WAYS)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("by_row", [False, True])
def test_a_processor_without_bfloat16_multiplies_float32(by_row, with_bias, send, without_bfloat16):
    torch.manual_seed(0)
    a, b, bias = (
        each.bfloat16()
        for each in (random_matrix(40, 65, by_row), random_matrix(65, 48, by_row), torch.randn(48))
    )
    inputs = (bias, a, b) if with_bias else (a, b)
    sent = send(capture(torch.addmm if with_bias else torch.mm, *inputs))
    assert count_products(sent, send) == 1
    assert count_calls(sent, "mm.default") == 0
    product = sent(*inputs)
    exact = a.double() @ b.double() + (bias.double() if with_bias else 0)
    assert product.dtype == torch.bfloat16
    bound = error_bound(a, b, 2**-23) + 2**-8 * exact.abs()
    assert ((product.double() - exact).abs() <= bound).all()


@needs_tiles
@compiles
def test_a_compiled_graph_without_bfloat16_has_the_numbers_and_strides_of_torch_s(without_bfloat16):
    torch.manual_seed(0)
    inputs = [torch.randn(size).div(8).bfloat16() for size in ((32, 64), (96, 64), (80, 96))]
    graph = capture(many_products, *inputs)
    matrix_products.register_tile_lowering()
    sent = compute_products_by_tiles(graph)
    assert count_calls(sent, "pyro_vae.product") == 8
    for result, expected in zip(torch._inductor.compile(sent, inputs)(*inputs), graph(*inputs), strict=True):
        torch.testing.assert_close(result, expected, rtol=0.05, atol=0.05)
        assert result.stride() == expected.stride()


@pytest.mark.parametrize("with_bias", [False, True])
def test_a_reduced_product_goes_to_tiles_where_there_are_such(with_bias, monkeypatch):
    """Seen from any processor: the graph is made and its shapes are inferred, nothing is multiplied."""
    monkeypatch.setattr(matrix_products, "_has_fast_microkernel", lambda dtype: True)
    monkeypatch.setattr(matrix_products, "_has_bfloat16_instructions", lambda: True)
    inputs = [torch.randn(48).bfloat16(), torch.randn(40, 64).bfloat16(), torch.randn(64, 48).bfloat16()]
    inputs = inputs if with_bias else inputs[1:]
    sent = compute_products_by_tiles(capture(torch.addmm if with_bias else torch.mm, *inputs))
    assert count_calls(sent, "pyro_vae.product") == 1
    assert count_calls(sent, "mm.default") == 0
    product = sent(*(each.to("meta") for each in inputs))
    assert (product.shape, product.dtype) == ((40, 48), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precision", ["highest", "medium"])
@pytest.mark.parametrize("amx", [False, True])
def test_a_large_reduced_product_is_torch_s_with_amx(amx, precision, dtype, monkeypatch):
    monkeypatch.setattr(matrix_products, "_has_fast_microkernel", lambda dtype: True)
    monkeypatch.setattr(matrix_products, "_has_bfloat16_instructions", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    a, b = torch.randn(1024, 784).to(dtype), torch.randn(784, 400).to(dtype)
    reduced = dtype is torch.bfloat16 or precision == "medium"
    for rows, kept in ((1024, amx and reduced), (128, False)):
        graph = capture(torch.mm, a[:rows], b)
        with medium_precision() if precision == "medium" else nullcontext():
            assert count_calls(compute_products_by_tiles(graph), "mm.default") == kept


@needs_bfloat16_tiles
@compiles
def test_a_reduced_product_is_rounded_once_and_only_if_it_is_used_so():
    torch.manual_seed(0)
    a, b = torch.randn(40, 48).bfloat16(), torch.randn(48, 64).bfloat16()
    matrix_products.register_tile_lowering()
    graph = compute_products_by_tiles(capture(lambda a, b: [(a @ b).float(), a @ b], a, b))
    unrounded, rounded = torch._inductor.compile(graph, [a, b])(a, b)
    exact, bound = a.double() @ b.double(), error_bound(a, b, 2**-24)
    assert (unrounded.dtype, rounded.dtype) == (torch.float32, torch.bfloat16)
    assert ((unrounded.double() - exact).abs() <= bound).all()
    assert ((rounded.double() - exact).abs() <= bound + 2**-8 * exact.abs()).all()
    odd = capture(torch.mm, a[:, :47], b[:47])
    assert targets(compute_products_by_tiles(odd)) == targets(odd)  # its rows are taken in pairs


@needs_bfloat16_tiles
def test_medium_rounds_the_factors_and_not_the_product():
    a, b, bias = torch.randn(40, 48), torch.randn(48, 64), torch.randn(64)
    graph = capture(torch.addmm, bias, a, b)
    with medium_precision():
        reduced = compute_products_by_tiles(graph)(bias, a, b)
    rounded = bias.double() + a.bfloat16().double() @ b.bfloat16().double()
    assert ((reduced.double() - rounded).abs() <= error_bound(a, b, 2**-23)).all()
    assert (reduced.double() - a.double() @ b.double() - bias).abs().max() > 1e-3
    torch.testing.assert_close(
        compute_products_by_tiles(graph)(bias, a, b), bias + a @ b, rtol=1e-5, atol=1e-4
    )


@needs_bfloat16_tiles
@compiles
def test_medium_rounds_a_matrix_and_its_transpose_once():
    matrix_products.register_tile_lowering()
    inputs = torch.randn(40, 48), torch.randn(400, 48), torch.randn(40, 400)
    graph = capture(lambda x, w, y: [(x @ w.t()) * 2 + 1, y @ w], *inputs)
    with medium_precision():
        sent = compute_products_by_tiles(graph)
    compiled, (code,) = run_and_get_code(lambda: torch._inductor.compile(sent, list(inputs))(*inputs))
    assert code.count("empty_strided_cpu((400, 48), (48, 1), torch.bfloat16)") == 1
    for result, expected in zip(compiled, graph(*inputs), strict=True):
        torch.testing.assert_close(result, expected, rtol=0.01, atol=0.5)


def through_a_view(x, v, w):
    first = x @ w
    w.view(-1)[:1000].add_(1.0)
    return [first, x @ w]


def below_a_view(x, v, w):
    one = w[:]
    first = x @ one
    w.add_(1.0)
    return [first, x @ one]


def what_was_computed(x, v, w):
    h = torch.addmm(v[0], x, v)
    first = h @ w
    h.view(-1)[:1000].add_(5.0)
    return [first, h @ w]


def what_another_input_is_too(x, v, w):
    first = x @ v
    w.add_(1.0)
    return [first, x @ v]


@needs_bfloat16_tiles
@pytest.mark.parametrize("step", [through_a_view, below_a_view, what_was_computed, what_another_input_is_too])
def test_a_matrix_that_is_written_to_is_rounded_again(step):
    def inputs():
        v = torch.linspace(-1, 1, 48 * 48).view(48, 48)
        w = (
            v.view(48, 48)
            if step is what_another_input_is_too
            else torch.linspace(1, -1, 48 * 64).view(48, 64)
        )
        return torch.linspace(-1, 2, 40 * 48).view(40, 48), v, w

    expected = step(*inputs())
    assert (expected[0] - expected[1]).abs().max() > 1
    graph = capture(step, *inputs())
    with medium_precision():
        sent = compute_products_by_tiles(graph)
    assert count_calls(sent, "pyro_vae.product") >= 2
    for found, wanted in zip(sent(*inputs()), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.2)


class Multiplied(TorchDispatchMode):
    """Records the dtypes of the factors of torch's own products."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.dtypes.add(args[-1].dtype)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("has_bfloat16", [False, True])
def test_autocast_does_not_reduce_a_graph_again(has_bfloat16):
    programs, x = pair(width=64, hidden=40, dim=16), data(width=64, size=48)
    with (
        assume_onednn_faster(lambda dtype: False) as patch,
        torch.autocast("cpu", torch.bfloat16),
        Multiplied() as seen,
    ):
        patch.setattr(matrix_products, "_has_bfloat16_instructions", lambda: has_bfloat16)
        elbo = pv.CompiledELBO(Trace_ELBO(), backend="eager")
        elbo.loss_and_grads(*programs, x)
        assert torch.bfloat16 in seen.dtypes  # in the capture
        seen.dtypes.clear()
        elbo.loss_and_grads(*programs, x)
    assert seen.dtypes == {torch.bfloat16 if has_bfloat16 else torch.float32}
