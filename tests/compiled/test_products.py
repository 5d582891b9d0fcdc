"""The matrix products of a graph: which are replaced, with the same numbers for all strides."""

import pytest
import torch
from compiled_steps import captured_step, compiles
from product_graphs import (
    assume_onednn_faster,
    capture,
    count_calls,
    error_bound,
    many_products,
    medium_precision,
    needs_onednn,
    random_matrix,
    targets,
)
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from registry import data, pair
from torch.utils._python_dispatch import TorchDispatchMode

import pyro_vae as pv
from pyro_vae.compiled import products
from pyro_vae.compiled.products import choose_products

ELBOS = {"trace": Trace_ELBO, "mean-field": TraceMeanField_ELBO}


@needs_onednn
@pytest.mark.usefixtures("onednn_faster")
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("a_by_row", [False, True])
@pytest.mark.parametrize("b_by_row", [False, True])
@pytest.mark.parametrize("shape", [(24, 64, 40), (64, 24, 40), (64, 40, 24), (24, 40, 64)], ids=str)
def test_factors_may_have_any_strides(shape, a_by_row, b_by_row, with_bias):
    m, k, n = shape
    a, b = random_matrix(m, k, a_by_row), random_matrix(k, n, b_by_row)
    inputs = (torch.randn(n), a, b) if with_bias else (a, b)
    graph = capture(torch.addmm if with_bias else torch.mm, *inputs)
    chosen = choose_products(graph)
    assert count_calls(chosen, "pyro_vae.linear") == 1
    assert count_calls(chosen, "mm.default") == 0
    product = chosen(*inputs)
    exact = a.double() @ b.double() + (inputs[0].double() if with_bias else 0)
    assert ((product.double() - exact).abs() <= error_bound(a, b, 2**-23)).all()


@needs_onednn
@compiles
@pytest.mark.usefixtures("onednn_faster")
def test_compiled_products_have_the_numbers_and_strides_of_torch_s():
    torch.manual_seed(0)
    inputs = [torch.randn(size).div(8) for size in ((32, 64), (96, 64), (80, 96))]
    graph = capture(many_products, *inputs)
    chosen = choose_products(graph)
    assert count_calls(chosen, "pyro_vae.linear") == 8
    for run in (chosen, torch._inductor.compile(chosen, inputs)):
        for result, expected in zip(run(*inputs), graph(*inputs), strict=True):
            torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
            assert result.stride() == expected.stride()


@needs_onednn
@pytest.mark.usefixtures("onednn_faster")
@pytest.mark.parametrize("function", [lambda x, v, w: (x @ v) @ w, lambda x, v, w: x @ (v @ w)])
def test_a_factor_may_be_a_product(function):
    inputs = torch.randn(24, 32), torch.randn(32, 40), torch.randn(40, 48)
    graph = capture(function, *inputs)
    assert count_calls(choose_products(graph), "mm.default") == 0
    torch.testing.assert_close(choose_products(graph)(*inputs), graph(*inputs), rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("onednn_faster")
def test_small_products_spread_biases_and_doubles_stay_with_torch():
    for function, inputs in {
        torch.mm: (torch.randn(40, 8), torch.randn(8, 40)),
        torch.addmm: (torch.randn(1), torch.randn(40, 48), torch.randn(48, 64)),
        torch.matmul: (torch.randn(40, 48).double(), torch.randn(48, 64).double()),
        lambda a, b: torch.addmm(a, b, b, beta=2.0): (torch.randn(40), torch.randn(40, 40)),
    }.items():
        graph = capture(function, *inputs)
        assert targets(choose_products(graph)) == targets(graph)
        torch.testing.assert_close(choose_products(graph)(*inputs), graph(*inputs))


def test_torch_s_first_choice_stays_where_it_is_faster():
    graph = capture(torch.mm, torch.randn(40, 48), torch.randn(48, 64))
    with assume_onednn_faster(False):
        assert targets(choose_products(graph)) == targets(graph)


@needs_onednn
@pytest.mark.usefixtures("onednn_faster")
@pytest.mark.parametrize("elbo", ELBOS)
def test_the_large_products_of_a_step_are_chosen_with_the_same_result(elbo):
    programs = pair(width=64, hidden=40)
    x = data(width=64, size=48)
    with assume_onednn_faster(False):
        graph, inputs = captured_step(ELBOS[elbo](), *programs, x)
    chosen = choose_products(graph)
    # Of the two layers 64 x 40: forward, weights; and the way back through one.
    assert count_calls(chosen, "pyro_vae.linear") == 5
    results = []
    for module in (graph, chosen):
        torch.manual_seed(0)
        with torch.no_grad():
            results.append(module(*inputs))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-4)


@compiles
@pytest.mark.usefixtures("onednn_faster")
def test_compiled_gradients_have_the_strides_of_their_parameters():
    """Torch's fused Adam takes that for granted; several particles add up several products."""
    torch.manual_seed(0)
    programs = pair(width=64, hidden=40)
    x = data(width=64, size=512)
    gradients = []
    for backend in ("eager", "inductor"):
        elbo = pv.CompiledELBO(Trace_ELBO(num_particles=2), backend=backend)
        for p in pv.parameters(*programs):
            p.grad = None
        torch.manual_seed(1)
        elbo.loss_and_grads(*programs, x)
        gradients.append([p.grad for p in pv.parameters(*programs)])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-3)
    for p, gradient in zip(pv.parameters(*programs), gradients[1], strict=True):
        assert gradient.stride() == p.stride()


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("by_row", [False, True])
def test_a_processor_without_bfloat16_multiplies_float32(by_row, with_bias, monkeypatch):
    monkeypatch.setattr(products, "multiplies_bfloat16", lambda: False)
    torch.manual_seed(0)
    a, b, bias = (
        each.bfloat16()
        for each in (random_matrix(40, 65, by_row), random_matrix(65, 48, by_row), torch.randn(48))
    )
    inputs = (bias, a, b) if with_bias else (a, b)
    with assume_onednn_faster(False):
        chosen = choose_products(capture(torch.addmm if with_bias else torch.mm, *inputs))
    with Multiplied() as seen:
        product = chosen(*inputs)
    assert seen.dtypes == {torch.float32}
    exact = a.double() @ b.double() + (bias.double() if with_bias else 0)
    assert product.dtype == torch.bfloat16
    bound = error_bound(a, b, 2**-23) + 2**-8 * exact.abs()
    assert ((product.double() - exact).abs() <= bound).all()


@compiles
def test_a_compiled_graph_without_bfloat16_has_the_numbers_and_strides_of_torch_s(monkeypatch):
    monkeypatch.setattr(products, "multiplies_bfloat16", lambda: False)
    torch.manual_seed(0)
    inputs = [torch.randn(size).div(8).bfloat16() for size in ((32, 64), (96, 64), (80, 96))]
    graph = capture(many_products, *inputs)
    compiled = torch._inductor.compile(choose_products(graph), inputs)
    for result, expected in zip(compiled(*inputs), graph(*inputs), strict=True):
        torch.testing.assert_close(result, expected, rtol=0.05, atol=0.05)
        assert result.stride() == expected.stride()


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
        assume_onednn_faster(False) as patch,
        torch.autocast("cpu", torch.bfloat16),
        Multiplied() as seen,
    ):
        patch.setattr(products, "multiplies_bfloat16", lambda: has_bfloat16)
        elbo = pv.CompiledELBO(Trace_ELBO(), backend="eager")
        elbo.loss_and_grads(*programs, x)
        assert torch.bfloat16 in seen.dtypes  # in the capture
        seen.dtypes.clear()
        elbo.loss_and_grads(*programs, x)
    assert seen.dtypes == {torch.bfloat16 if has_bfloat16 else torch.float32}


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=compiles)])
def test_a_graph_multiplies_in_the_precision_that_is_set_now(backend):
    """As an eager step does: what torch does under "medium" depends on the processor."""
    programs, x = pair(width=64, hidden=40), data(width=64, size=48)
    elbo = pv.CompiledELBO(TraceMeanField_ELBO(), backend=backend)
    for setting in (False, True, False):
        found = []
        for each in (elbo, TraceMeanField_ELBO()):
            torch.manual_seed(0)
            if setting:
                with medium_precision():
                    found.append(each.loss_and_grads(*programs, x))
            else:
                found.append(each.loss_and_grads(*programs, x))
        assert found[0] == pytest.approx(found[1], rel=1e-2 if setting else 1e-5)
    assert elbo.num_graphs == 1
