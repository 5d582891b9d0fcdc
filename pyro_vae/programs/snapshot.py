"""Snapshot: what a run of a pair can change besides its parameters, and how to restore it."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

# A buffer with its place: the module that holds it and its name there.
Buffer = tuple[nn.Module, str, Tensor | None]


class Snapshot:
    """The current buffers (such as BatchNorm's), modes and random state.

    Args:
        modules: the modules whose modes, train or eval, to keep.
        buffers: the buffers whose values to keep.
        devices: the devices whose random state to keep, besides the CPU.
    """

    def __init__(
        self, modules: list[nn.Module], buffers: list[Buffer], devices: Iterable[torch.device]
    ) -> None:
        self._modes = [(module, module.training) for module in modules]
        self._buffers = [
            (module, name, buffer, buffer.clone()) for module, name, buffer in buffers if buffer is not None
        ]
        self._accelerators = [(torch.get_device_module(device), device) for device in devices]
        self._random_states = self._read_random_states()

    def restore(self, *, random_state: bool = True, buffers: bool = True) -> None:
        """Restore everything, random state and buffers only if asked for."""
        with torch.no_grad():
            for module, name, buffer, value in self._buffers if buffers else []:
                buffer.copy_(value)
                setattr(module, name, buffer)
        for module, training in self._modes:
            module.training = training
        if random_state:
            on_cpu, *others = self._random_states
            torch.set_rng_state(on_cpu)
            for (accelerator, device), state in zip(self._accelerators, others, strict=True):
                accelerator.set_rng_state(state, device)

    def random_state_moved(self) -> bool:
        """Return whether a random number was drawn since."""
        states = zip(self._read_random_states(), self._random_states, strict=True)
        with torch._C.DisableTorchFunction():  # a capture would refuse to read a tensor
            return any(now.numpy().tobytes() != then.numpy().tobytes() for now, then in states)

    def _read_random_states(self) -> list[Tensor]:
        return [torch.get_rng_state(), *(m.get_rng_state(device) for m, device in self._accelerators)]
