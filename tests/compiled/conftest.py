import pytest
from product_graphs import assume_onednn_faster


@pytest.fixture
def onednn_faster():
    """Products go to oneDNN wherever they can, not only where that is faster."""
    with assume_onednn_faster(True):
        yield
