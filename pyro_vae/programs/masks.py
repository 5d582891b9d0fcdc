"""masks: whether model and guide leave out the same log probabilities, by handlers or in distributions."""

from typing import Any

import torch
from pyro.distributions import MaskedDistribution
from pyro.infer.util import is_validation_enabled
from torch import Tensor


def same(p: Any, q: Any) -> bool:
    """Return whether two scales or two masks are the same."""
    p, q = (True if each is None else each for each in (p, q))  # no mask
    if isinstance(p, Tensor) or isinstance(q, Tensor):
        # Read under validation only, as in the check of a first batch: a captured graph cannot read values.
        return not is_validation_enabled() or bool((torch.as_tensor(p) == torch.as_tensor(q)).all())
    return bool(p == q)


def inner_mask(fn: Any) -> Any:
    """Return the mask inside a distribution, as of ``dist.Normal(0.0, 1.0).mask(mask)``; None without one."""
    while not isinstance(fn, MaskedDistribution):
        if not hasattr(fn, "base_dist"):
            return None
        fn = fn.base_dist
    return getattr(fn, "_mask", True)


def masked_alike(p: Any, q: Any) -> bool:
    """Return whether the masks inside two distributions are the same, as far as their shapes can tell."""
    masks = [inner_mask(fn) for fn in (p, q)]
    shapes = [torch.as_tensor(mask).shape for mask in masks if mask is not None]
    return not shapes or (len(shapes) == 2 and (shapes[0] != shapes[1] or same(*masks)))
