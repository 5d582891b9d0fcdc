"""Features of sixteen bits."""

import torch
from registry import FAMILIES

import pyro_vae as pv


def test_sixteen_bits_are_widened_before_a_log_probability():
    for name, make in FAMILIES.items():
        family = make(5)
        features = torch.randn(2, family.num_features(5))
        for dtype in (torch.bfloat16, torch.float16):
            narrow = features.to(dtype)
            p = family(narrow)
            x = p.sample()
            assert x.dtype == torch.float32, name
            torch.testing.assert_close(p.log_prob(x), family(narrow.float()).log_prob(x))


def test_a_draw_of_a_full_covariance_under_autocast_is_of_its_density():
    """E[-log q] is the entropy. With a product in bfloat16, it was nats too high."""
    size = 20
    features = (1.3 * torch.randn(pv.FullNormal().num_features(size))).expand(2000, -1)
    with torch.autocast("cpu", torch.bfloat16):
        q = pv.FullNormal()(features)
        surprise = -q.log_prob(q.rsample())
    error = surprise.std() / len(surprise) ** 0.5
    assert (surprise.mean() - q.entropy()[0]).abs() < 5 * error
    assert error < 0.1
    assert type(q).__name__.endswith("MultivariateNormal")
    assert q.expand([3, 2000]).rsample((2,)).shape == (2, 3, 2000, size)
