"""The C++ kernel that onednn_multiplies two matrices tile by tile."""

import pytest
import torch
from product_graphs import DTYPES, error_bound, needs_bfloat16_tiles, needs_tiles, num_threads

from pyro_vae.compiled.cpu import matrix_products

pytestmark = pytest.mark.usefixtures("products_replaced_everywhere")

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


@needs_tiles
@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_product_by_tiles_is_the_product(shape, dtype, number):
    m, k, n = shape
    torch.manual_seed(0)
    a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
    out = torch.full((m + 1, n), torch.nan)
    with num_threads(number):
        matrix_products._multiply_into(a, b, out=out[:m])
        product = torch.ops.pyro_vae.product(a, b)
    expected = a.double() @ b.double()
    for each in (out[:m], product):
        assert each.dtype == torch.float32  # a sum of bfloat16 too
        assert ((each.double() - expected).abs() <= error_bound(a, b, 2**-24)).all()
    assert out[m].isnan().all()  # nothing is written beyond


@needs_tiles
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_number_that_is_not_finite_is_not_lost(bad, dtype):
    for row in (0, 17, 39):
        a, b = torch.ones(40, 48), torch.zeros(48, 64)
        a[row, 5] = bad
        product = torch.ops.pyro_vae.product(a.to(dtype), b.to(dtype))
        assert product[row].isnan().all()
        assert product.isnan().sum() == 64


@needs_bfloat16_tiles
@pytest.mark.filterwarnings("ignore:TF32 acceleration")
@pytest.mark.parametrize("number", [1, 2])
def test_a_failing_microkernel_is_an_error_and_no_crash(number):
    a = torch.randn(256, 256).bfloat16()
    with (
        num_threads(number),
        torch.backends.mkldnn.flags(enabled=False),
        pytest.raises(RuntimeError, match="16"),
    ):
        torch.ops.pyro_vae.product(a, a)
