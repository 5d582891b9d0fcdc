import pytest
from product_graphs import assume_onednn_faster, onednn_multiplies


@pytest.fixture
def products_replaced_everywhere():
    """Products go to oneDNN and to tiles wherever they can, not only where that is faster."""
    with assume_onednn_faster(onednn_multiplies):
        yield
