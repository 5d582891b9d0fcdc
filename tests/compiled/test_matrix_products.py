"""The float32 products of a graph: which are replaced, with the same numbers for all strides."""

import pytest
import torch
from compiled_steps import captured_step, compiles
from product_graphs import (
    BOTH_WAYS,
    DTYPES,
    assume_onednn_faster,
    capture,
    count_calls,
    count_products,
    many_products,
    needs_tiles,
    random_matrix,
    targets,
)
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from registry import data, pair
from torch._inductor import config
from torch._inductor.utils import run_and_get_code

import pyro_vae as pv
from pyro_vae.compiled.cpu import matrix_products
from pyro_vae.compiled.cpu.matrix_products import compute_products_by_tiles, send_products_to_onednn

pytestmark = pytest.mark.usefixtures("products_replaced_everywhere")

ELBOS = {"trace": Trace_ELBO, "mean-field": TraceMeanField_ELBO}


@pytest.mark.parametrize("send", BOTH_WAYS)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("a_by_row", [False, True])
@pytest.mark.parametrize("b_by_row", [False, True])
@pytest.mark.parametrize("shape", [(24, 64, 40), (64, 24, 40), (64, 40, 24), (24, 40, 64)], ids=str)
def test_factors_may_have_any_strides(shape, a_by_row, b_by_row, with_bias, send):
    m, k, n = shape
    a, b = random_matrix(m, k, a_by_row), random_matrix(k, n, b_by_row)
    if with_bias:
        inputs = torch.randn(n), a, b
        graph = capture(torch.addmm, *inputs)
    else:
        inputs = a, b
        graph = capture(torch.mm, *inputs)
    sent = send(graph)
    assert count_products(sent, send) == 1
    assert count_calls(sent, "mm.default") == 0
    torch.testing.assert_close(sent(*inputs), graph(*inputs), rtol=1e-5, atol=1e-4)


@needs_tiles
@compiles
@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_products_have_the_numbers_and_strides_of_torch_s(dtype):
    torch.manual_seed(0)
    inputs = [torch.randn(size).div(8).to(dtype) for size in ((32, 64), (96, 64), (80, 96))]
    graph = capture(many_products, *inputs)
    sent = compute_products_by_tiles(graph)
    assert count_calls(sent, "pyro_vae.product") == 8
    matrix_products.register_tile_lowering()
    compiled = torch._inductor.compile(sent, inputs)
    tolerance = 1e-5 if dtype is torch.float32 else 0.05
    for run in (sent, compiled):
        for result, expected in zip(run(*inputs), graph(*inputs), strict=True):
            torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)
            assert result.stride() == expected.stride()


@needs_tiles
@compiles
@pytest.mark.parametrize(("rows", "left"), [(16, "arg1_1"), (200, "arg0_1")])
def test_the_smaller_matrices_are_copied(rows, left):
    """For x w^T that is x, which makes it (w x^T)^T, or w."""
    matrix_products.register_tile_lowering()
    x, w = torch.randn(rows, 64), torch.randn(128, 64)
    graph = compute_products_by_tiles(capture(lambda x, w: (x @ w.t()).sin().cos(), x, w))
    _, (code,) = run_and_get_code(lambda: torch._inductor.compile(graph, [x, w])(x, w))
    assert f"pyro_vae_product({left}, " in code


@pytest.mark.parametrize("send", BOTH_WAYS)
@pytest.mark.parametrize("function", [lambda x, v, w: (x @ v) @ w, lambda x, v, w: x @ (v @ w)])
def test_a_factor_may_be_a_product(function, send):
    inputs = torch.randn(24, 32), torch.randn(32, 40), torch.randn(40, 48)
    graph = capture(function, *inputs)
    assert count_calls(send(graph), "mm.default") == 0
    torch.testing.assert_close(send(graph)(*inputs), graph(*inputs), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("send", [send_products_to_onednn, compute_products_by_tiles])
def test_small_products_spread_biases_and_doubles_stay_with_torch(send):
    for function, inputs in {
        torch.mm: (torch.randn(40, 8), torch.randn(8, 40)),
        torch.addmm: (torch.randn(1), torch.randn(40, 48), torch.randn(48, 64)),
        torch.matmul: (torch.randn(40, 48).double(), torch.randn(48, 64).double()),
        lambda a, b: torch.addmm(a, b, b, beta=2.0): (torch.randn(40), torch.randn(40, 40)),
    }.items():
        graph = capture(function, *inputs)
        assert targets(send(graph)) == targets(graph)
        torch.testing.assert_close(send(graph)(*inputs), graph(*inputs))


def test_without_microkernels_a_graph_is_left_to_torch(monkeypatch):
    def no_kernel():
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(matrix_products, "_kernel", no_kernel)
    matrix_products._has_fast_microkernel.cache_clear()
    try:
        graph = capture(torch.mm, torch.randn(40, 48), torch.randn(48, 64))
        assert targets(compute_products_by_tiles(graph)) == targets(graph)
    finally:
        matrix_products._has_fast_microkernel.cache_clear()


@pytest.mark.parametrize("send", [send_products_to_onednn, compute_products_by_tiles])
def test_torch_s_first_choice_stays_where_it_is_faster(send):
    graph = capture(torch.mm, torch.randn(40, 48), torch.randn(48, 64))
    with assume_onednn_faster(lambda dtype: False):
        assert targets(send(graph)) == targets(graph)


def test_products_stay_with_torch_s_compiler_if_its_wrapper_is_cpp():
    graph = capture(torch.mm, torch.randn(40, 48), torch.randn(48, 64))
    with config.patch(cpp_wrapper=True):
        assert targets(compute_products_by_tiles(graph)) == targets(graph)


@pytest.mark.parametrize("send", BOTH_WAYS)
@pytest.mark.parametrize("elbo", ELBOS)
def test_the_large_products_of_a_step_are_sent_with_the_same_result(elbo, send):
    programs = pair(width=64, hidden=40)
    x = data(width=64, size=48)
    graph, inputs = captured_step(ELBOS[elbo](), *programs, x)
    sent = send(graph)
    # Of the two layers 64 x 40: forward, weights; and the way back through one.
    assert count_products(sent, send) == 5
    results = []
    for module in (graph, sent):
        torch.manual_seed(0)
        with torch.no_grad():
            results.append(module(*inputs))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-4)


@needs_tiles
@compiles
def test_compiled_gradients_have_the_strides_of_their_parameters():
    """Torch's fused Adam takes that for granted (2.15); several particles add up several products."""
    torch.manual_seed(0)
    programs = pair(width=64, hidden=40)
    x = data(width=64, size=512)
    gradients = []
    for backend in ("eager", "inductor"):
        elbo = pv.CompiledELBO(Trace_ELBO(num_particles=3), backend=backend)
        for p in pv.parameters(*programs):
            p.grad = None
        torch.manual_seed(1)
        elbo.loss_and_grads(*programs, x)
        gradients.append([p.grad for p in pv.parameters(*programs)])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-3)
    for p, gradient in zip(pv.parameters(*programs), gradients[1], strict=True):
        assert gradient.stride() == p.stride()
