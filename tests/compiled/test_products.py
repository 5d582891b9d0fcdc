"""Matrix products: by oneDNN and by tiles, the same numbers wherever the factors lie."""

from contextlib import contextmanager, nullcontext

import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from registry import data, pair
from torch._inductor import config
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import pyro_vae as pv
from pyro_vae.compiled.cpu import matrix_products
from pyro_vae.compiled.cpu.matrix_products import compute_products_by_tiles, send_products_to_onednn
from pyro_vae.compiled.graph import Graph


def multiplies(dtype):
    """Whether oneDNN does so here, be it faster than torch's first choice or not."""
    return dtype is torch.float32 or torch.cpu._is_avx512_bf16_supported()


@contextmanager
def ahead(where):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matrix_products, "_onednn_is_faster", where)
        matrix_products._has_fast_microkernel.cache_clear()
        yield patch
    matrix_products._has_fast_microkernel.cache_clear()


@pytest.fixture(autouse=True)
def _everywhere():
    """Products go to oneDNN and to tiles wherever they can, not only where that is faster."""
    with ahead(multiplies):
        yield


with ahead(multiplies):
    tiles = pytest.mark.skipif(
        not matrix_products._has_fast_microkernel(torch.float32),
        reason="no C++ compiler, or a processor without AVX2",
    )
    reduced_tiles = pytest.mark.skipif(
        not matrix_products._has_fast_microkernel(torch.bfloat16),
        reason="a processor that does not multiply bfloat16",
    )
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=reduced_tiles)]
ELBOS = {"trace": Trace_ELBO, "mean-field": TraceMeanField_ELBO}


@contextmanager
def threads(number):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def medium():
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


def targets(module):
    return [str(node.target) for node in module.graph.nodes if node.op == "call_function"]


def count(module, name):
    return sum(name in target for target in targets(module))


def error_bound(a, b, epsilon):
    """Of a sum of k products in any order, for each number of a b."""
    return 2 * a.shape[1] * epsilon * (a.double().abs() @ b.double().abs())


# Tall, wide and deep; sides that no tile divides, more than a tile of each kind, rows 4096 bytes apart.
SHAPES = [
    (16, 16, 16),
    (128, 784, 400),
    (37, 1300, 50),
    (17, 18, 33),
    (600, 2050, 40),
    (40, 34, 1024),
    (530, 24, 70),
]


@tiles
@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_product_by_tiles_is_the_product(shape, dtype, number):
    m, k, n = shape
    torch.manual_seed(0)
    a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
    out = torch.full((m + 1, n), torch.nan)
    with threads(number):
        matrix_products._multiply_into(a, b, out=out[:m])
        product = torch.ops.pyro_vae.product(a, b)
    expected = a.double() @ b.double()
    for each in (out[:m], product):
        assert each.dtype == torch.float32  # a sum of bfloat16 too
        assert ((each.double() - expected).abs() <= error_bound(a, b, 2**-24)).all()
    assert out[m].isnan().all()  # nothing is written beyond


@tiles
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_number_that_is_not_finite_is_not_lost(bad, dtype):
    for row in (0, 17, 39):
        a, b = torch.ones(40, 48), torch.zeros(48, 64)
        a[row, 5] = bad
        product = torch.ops.pyro_vae.product(a.to(dtype), b.to(dtype))
        assert product[row].isnan().all()
        assert product.isnan().sum() == 64


@reduced_tiles
@pytest.mark.filterwarnings("ignore:TF32 acceleration")
@pytest.mark.parametrize("number", [1, 2])
def test_a_failing_microkernel_is_an_error_and_no_crash(number):
    a = torch.randn(256, 256).bfloat16()
    with threads(number), torch.backends.mkldnn.flags(enabled=False), pytest.raises(RuntimeError, match="16"):
        torch.ops.pyro_vae.product(a, a)


def captured(function, *inputs):
    return make_fx(function)(*inputs)


def lying(rows, columns, by_row):
    return torch.randn(rows, columns) if by_row else torch.randn(columns, rows).t()


@pytest.mark.parametrize(
    "send", [send_products_to_onednn, pytest.param(compute_products_by_tiles, marks=tiles)]
)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("a_by_row", [False, True])
@pytest.mark.parametrize("b_by_row", [False, True])
@pytest.mark.parametrize("shape", [(24, 64, 40), (64, 24, 40), (64, 40, 24), (24, 40, 64)], ids=str)
def test_factors_may_lie_as_they_like(shape, a_by_row, b_by_row, with_bias, send):
    m, k, n = shape
    a, b = lying(m, k, a_by_row), lying(k, n, b_by_row)
    if with_bias:
        inputs = torch.randn(n), a, b
        graph = captured(torch.addmm, *inputs)
    else:
        inputs = a, b
        graph = captured(torch.mm, *inputs)
    sent = send(graph)
    assert count(sent, "_linear_pointwise" if send is send_products_to_onednn else "pyro_vae.product") == 1
    assert count(sent, "mm.default") == 0
    torch.testing.assert_close(sent(*inputs), graph(*inputs), rtol=1e-5, atol=1e-4)


def everything(x, v, w):
    """Products whose results are used, seen, written to and returned in many ways."""
    h = x @ v.t()
    seen = (x @ v.t()).relu().view(-1).sin()  # no view of a matrix that lies the other way round
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
        (v.t() @ w.t()) * 2 * 3 + 1,  # a result at some distance
        (x.t() @ h[:, 8:72]).exp(),
        torch.addmm(w[:, 0], x[::2], w.t()[:64]),
        x @ x[:1].expand(24, -1).t(),
    ]


@tiles
@pytest.mark.filterwarnings("default")  # torch 2.11's compiler uses what torch deprecates
@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_products_have_the_numbers_and_lie_as_they_should(dtype):
    torch.manual_seed(0)
    inputs = [torch.randn(size).div(8).to(dtype) for size in ((32, 64), (96, 64), (80, 96))]
    graph = captured(everything, *inputs)
    sent = compute_products_by_tiles(graph)
    assert count(sent, "pyro_vae.product") == 8
    matrix_products.register_tile_lowering()
    compiled = torch._inductor.compile(sent, inputs)
    tolerance = 1e-5 if dtype is torch.float32 else 0.05
    for run in (sent, compiled):
        for result, expected in zip(run(*inputs), graph(*inputs), strict=True):
            torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)
            assert result.stride() == expected.stride()


@pytest.fixture
def without_bfloat16():
    """A processor that does not multiply bfloat16."""
    with ahead(lambda dtype: dtype is torch.float32) as patch:
        patch.setattr(matrix_products, "_has_bfloat16_instructions", lambda: False)
        yield


@pytest.mark.parametrize(
    "send", [send_products_to_onednn, pytest.param(compute_products_by_tiles, marks=tiles)]
)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("by_row", [False, True])
def test_a_processor_without_bfloat16_multiplies_float32(by_row, with_bias, send, without_bfloat16):
    torch.manual_seed(0)
    a, b, bias = (each.bfloat16() for each in (lying(40, 65, by_row), lying(65, 48, by_row), torch.randn(48)))
    inputs = (bias, a, b) if with_bias else (a, b)
    sent = send(captured(torch.addmm if with_bias else torch.mm, *inputs))
    assert count(sent, "_linear_pointwise" if send is send_products_to_onednn else "pyro_vae.product") == 1
    assert count(sent, "mm.default") == 0
    product = sent(*inputs)
    exact = a.double() @ b.double() + (bias.double() if with_bias else 0)
    assert product.dtype == torch.bfloat16
    bound = error_bound(a, b, 2**-23) + 2**-8 * exact.abs()
    assert ((product.double() - exact).abs() <= bound).all()


@tiles
@pytest.mark.filterwarnings("default")
def test_a_compiled_graph_without_bfloat16_has_the_numbers_and_lies_as_it_should(without_bfloat16):
    torch.manual_seed(0)
    inputs = [torch.randn(size).div(8).bfloat16() for size in ((32, 64), (96, 64), (80, 96))]
    graph = captured(everything, *inputs)
    matrix_products.register_tile_lowering()
    sent = compute_products_by_tiles(graph)
    assert count(sent, "pyro_vae.product") == 8
    for result, expected in zip(torch._inductor.compile(sent, inputs)(*inputs), graph(*inputs), strict=True):
        torch.testing.assert_close(result, expected, rtol=0.05, atol=0.05)
        assert result.stride() == expected.stride()


@tiles
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("rows", "left"), [(16, "arg1_1"), (200, "arg0_1")])
def test_the_smaller_matrices_are_moved(rows, left):
    """For x w^T that is x, which makes it (w x^T)^T, or w."""
    matrix_products.register_tile_lowering()
    x, w = torch.randn(rows, 64), torch.randn(128, 64)
    graph = compute_products_by_tiles(captured(lambda x, w: (x @ w.t()).sin().cos(), x, w))
    _, (code,) = run_and_get_code(lambda: torch._inductor.compile(graph, [x, w])(x, w))
    assert f"pyro_vae_product({left}, " in code


@pytest.mark.parametrize(
    "send", [send_products_to_onednn, pytest.param(compute_products_by_tiles, marks=tiles)]
)
@pytest.mark.parametrize("function", [lambda x, v, w: (x @ v) @ w, lambda x, v, w: x @ (v @ w)])
def test_a_factor_may_be_a_product(function, send):
    inputs = torch.randn(24, 32), torch.randn(32, 40), torch.randn(40, 48)
    graph = captured(function, *inputs)
    assert count(send(graph), "mm.default") == 0
    torch.testing.assert_close(send(graph)(*inputs), graph(*inputs), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("send", [send_products_to_onednn, compute_products_by_tiles])
def test_what_is_small_or_spread_or_double_is_left_to_torch(send):
    for function, inputs in {
        torch.mm: (torch.randn(40, 8), torch.randn(8, 40)),
        torch.addmm: (torch.randn(1), torch.randn(40, 48), torch.randn(48, 64)),
        torch.matmul: (torch.randn(40, 48).double(), torch.randn(48, 64).double()),
        lambda a, b: torch.addmm(a, b, b, beta=2.0): (torch.randn(40), torch.randn(40, 40)),
    }.items():
        graph = captured(function, *inputs)
        assert targets(send(graph)) == targets(graph)
        torch.testing.assert_close(send(graph)(*inputs), graph(*inputs))


@pytest.mark.parametrize("with_bias", [False, True])
def test_a_reduced_product_goes_to_tiles_where_there_are_such(with_bias, monkeypatch):
    """Seen from any processor: the graph is made and its shapes are inferred, nothing is multiplied."""
    monkeypatch.setattr(matrix_products, "_has_fast_microkernel", lambda dtype: True)
    monkeypatch.setattr(matrix_products, "_has_bfloat16_instructions", lambda: True)
    inputs = [torch.randn(48).bfloat16(), torch.randn(40, 64).bfloat16(), torch.randn(64, 48).bfloat16()]
    inputs = inputs if with_bias else inputs[1:]
    sent = compute_products_by_tiles(captured(torch.addmm if with_bias else torch.mm, *inputs))
    assert count(sent, "pyro_vae.product") == 1
    assert count(sent, "mm.default") == 0
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
        graph = captured(torch.mm, a[:rows], b)
        with medium() if precision == "medium" else nullcontext():
            assert count(compute_products_by_tiles(graph), "mm.default") == kept


@reduced_tiles
@pytest.mark.filterwarnings("default")
def test_a_reduced_product_is_rounded_once_and_only_if_it_is_used_so():
    torch.manual_seed(0)
    a, b = torch.randn(40, 48).bfloat16(), torch.randn(48, 64).bfloat16()
    matrix_products.register_tile_lowering()
    graph = compute_products_by_tiles(captured(lambda a, b: [(a @ b).float(), a @ b], a, b))
    unrounded, rounded = torch._inductor.compile(graph, [a, b])(a, b)
    exact, bound = a.double() @ b.double(), error_bound(a, b, 2**-24)
    assert (unrounded.dtype, rounded.dtype) == (torch.float32, torch.bfloat16)
    assert ((unrounded.double() - exact).abs() <= bound).all()
    assert ((rounded.double() - exact).abs() <= bound + 2**-8 * exact.abs()).all()
    odd = captured(torch.mm, a[:, :47], b[:47])
    assert targets(compute_products_by_tiles(odd)) == targets(odd)  # its rows are taken in pairs


@reduced_tiles
def test_medium_rounds_the_factors_and_not_the_product():
    a, b, bias = torch.randn(40, 48), torch.randn(48, 64), torch.randn(64)
    graph = captured(torch.addmm, bias, a, b)
    with medium():
        reduced = compute_products_by_tiles(graph)(bias, a, b)
    rounded = bias.double() + a.bfloat16().double() @ b.bfloat16().double()
    assert ((reduced.double() - rounded).abs() <= error_bound(a, b, 2**-23)).all()
    assert (reduced.double() - a.double() @ b.double() - bias).abs().max() > 1e-3
    torch.testing.assert_close(
        compute_products_by_tiles(graph)(bias, a, b), bias + a @ b, rtol=1e-5, atol=1e-4
    )


@reduced_tiles
@pytest.mark.filterwarnings("default")
def test_medium_rounds_a_matrix_and_its_transpose_once():
    matrix_products.register_tile_lowering()
    inputs = torch.randn(40, 48), torch.randn(400, 48), torch.randn(40, 400)
    graph = captured(lambda x, w, y: [(x @ w.t()) * 2 + 1, y @ w], *inputs)
    with medium():
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


@reduced_tiles
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
    graph = captured(step, *inputs())
    with medium():
        sent = compute_products_by_tiles(graph)
    assert count(sent, "pyro_vae.product") >= 2
    for found, wanted in zip(sent(*inputs()), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.2)


def test_without_microkernels_a_graph_is_left_to_torch(monkeypatch):
    def no_kernel():
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(matrix_products, "_kernel", no_kernel)
    matrix_products._has_fast_microkernel.cache_clear()
    try:
        graph = captured(torch.mm, torch.randn(40, 48), torch.randn(48, 64))
        assert targets(compute_products_by_tiles(graph)) == targets(graph)
    finally:
        matrix_products._has_fast_microkernel.cache_clear()


@pytest.mark.parametrize("send", [send_products_to_onednn, compute_products_by_tiles])
def test_where_torch_s_first_choice_is_faster_it_stays(send):
    graph = captured(torch.mm, torch.randn(40, 48), torch.randn(48, 64))
    with ahead(lambda dtype: False):
        assert targets(send(graph)) == targets(graph)


def test_where_the_compiler_makes_its_wrapper_of_cpp_products_are_left_to_it():
    graph = captured(torch.mm, torch.randn(40, 48), torch.randn(48, 64))
    with config.patch(cpp_wrapper=True):
        assert targets(compute_products_by_tiles(graph)) == targets(graph)


@pytest.mark.parametrize(
    "send", [send_products_to_onednn, pytest.param(compute_products_by_tiles, marks=tiles)]
)
@pytest.mark.parametrize("elbo", ELBOS)
def test_the_large_products_of_a_step_are_sent_with_the_same_result(elbo, send):
    programs = pair(width=64, hidden=40)
    x = data(width=64, size=48)
    graph = pv.CompiledELBO(ELBOS[elbo](), backend="eager")._loss(*programs, (x,), {}, gradients=True).graph
    sent = send(graph._captured)
    # Of the two layers 64 x 40: forward, weights; and the way back through one.
    assert count(sent, "_linear_pointwise" if send is send_products_to_onednn else "pyro_vae.product") == 5
    results = []
    for module in (graph._captured, sent):
        torch.manual_seed(0)
        with torch.no_grad():
            results.append(module(*graph._inputs((x,), {})))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-4)


@tiles
@pytest.mark.filterwarnings("default")
def test_compiled_gradients_lie_as_their_parameters():
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


class Multiplied(TorchDispatchMode):
    """The dtypes of the factors that are multiplied, as torch does it in the end."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.dtypes.add(args[-1].dtype)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("has_bfloat16", [False, True])
def test_autocast_does_not_reduce_a_graph_again(has_bfloat16):
    programs, batch = pair(width=64, hidden=40, dim=16), (data(width=64, size=48),)
    with ahead(lambda dtype: False) as patch, torch.autocast("cpu", torch.bfloat16), Multiplied() as seen:
        patch.setattr(matrix_products, "_has_bfloat16_instructions", lambda: has_bfloat16)
        loss = pv.CompiledELBO(Trace_ELBO(), backend="eager")._loss(*programs, batch, {}, gradients=True)
        assert torch.bfloat16 in seen.dtypes  # in the capture
        seen.dtypes.clear()
        loss.run(batch, {})
    assert seen.dtypes == {torch.bfloat16 if has_bfloat16 else torch.float32}


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=tiles)])
@pytest.mark.filterwarnings("default")
def test_what_a_program_keeps_from_autocast_stays_float32(compiled):
    def kept(a, b):
        with torch.autocast("cpu", enabled=False):
            return a @ b

    torch.manual_seed(0)
    a, b = torch.randn(40, 48), torch.randn(48, 64)
    with ahead(lambda dtype: False), torch.autocast("cpu", torch.bfloat16):
        graph = Graph(kept, (), (a, b), {})
        product = (graph.compile() if compiled else graph)(a, b)
    assert ((product.double() - a.double() @ b.double()).abs() <= error_bound(a, b, 2**-24)).all()


def test_each_precision_has_its_own_graph():
    programs = pair()
    elbo = pv.CompiledELBO(Trace_ELBO(), backend="eager")
    elbo.loss(*programs, data())
    with medium():
        elbo.loss(*programs, data())
    elbo.loss(*programs, data())
    assert elbo.num_graphs == 2


def test_a_gpu_s_precision_has_its_own_graph(monkeypatch):
    """Of full precision there is one graph, whether that was never set ("none") or is set again ("ieee")."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    programs = pair()
    elbo = pv.CompiledELBO(Trace_ELBO(), backend="eager")
    for precision in ("none", "tf32", "ieee", "tf32", "none"):
        monkeypatch.setattr(torch._C, "_get_fp32_precision_getter", lambda backend, operation, p=precision: p)
        elbo.loss(*programs, data())
    assert elbo.num_graphs == 2
