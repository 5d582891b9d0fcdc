"""Features of sixteen bits."""

import torch
from registry import FAMILIES


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
