"""All random states from which a training draws, as tensors and numbers."""

import random
import sys
from typing import Any

import torch

from pyro_vae.programs import Pair


def random_states(pair: Pair, batches: Any) -> dict[str, Any]:
    """Return the states of torch's generators, of Python, of NumPy and of a loader, as they are now."""
    states: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    for device in _devices(pair):
        states[str(device)] = torch.get_device_module(device).get_rng_state(device)
    if "numpy" in sys.modules:
        name, words, *rest = sys.modules["numpy"].random.get_state()
        states["numpy"] = [name, torch.tensor(words.astype("int64")), *rest]
    generator = getattr(batches, "generator", None)
    if isinstance(generator, torch.Generator):
        states["loader"] = generator.get_state()
    return states


def set_random_states(states: dict[str, Any], pair: Pair, batches: Any) -> None:
    """Set all of them. A device that the first run did not have keeps its state."""
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    for device in _devices(pair):
        if str(device) in states:
            torch.get_device_module(device).set_rng_state(states[str(device)], device)
    if "numpy" in states and "numpy" in sys.modules:
        name, words, *rest = states["numpy"]
        sys.modules["numpy"].random.set_state((name, words.numpy().astype("uint32"), *rest))
    generator = getattr(batches, "generator", None)
    if isinstance(generator, torch.Generator) and "loader" in states:
        generator.set_state(states["loader"])


def _devices(pair: Pair) -> list[torch.device]:
    return sorted({p.device for p in pair.parameters if not p.is_cpu}, key=str)
