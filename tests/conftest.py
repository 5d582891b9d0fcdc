import pyro
import pytest
import torch

import pyro_vae as pv

# Small tensors: a second thread costs more than it saves, and one gives the same sums everywhere.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fresh_start():
    """Give every test the same seed, an empty parameter store, and Pyro's default validation."""
    torch.manual_seed(0)
    pyro.clear_param_store()
    with pyro.validation_enabled(True):
        yield
    pyro.clear_param_store()


@pytest.fixture
def few(monkeypatch):
    """The embedded data, cut to a few hundred images."""
    load = pv.data.load

    def load_few(*args, **kwargs):
        images = load(*args, **kwargs)
        return images._replace(pixels=images.pixels[:300], labels=images.labels[:300])

    monkeypatch.setattr(pv.data, "load", load_few)
