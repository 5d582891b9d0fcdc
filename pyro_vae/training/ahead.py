"""StepsAhead: the steps of a training; on a GPU, without waiting for the loss of each."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_vae.optimiser import parameters_of
from pyro_vae.programs import Pair, parameters
from pyro_vae.programs.pair import copied, leaves
from pyro_vae.programs.snapshot import Snapshot
from pyro_vae.svi import SVI
from pyro_vae.training import processes

# Where steps run ahead, the most steps between two looks at the device, and the most bytes of batches and
# buffers that are kept for them.
DEVICE, STEPS, BYTES = "cuda", 50, 2**28


class _Launched(NamedTuple):
    """A step of which nobody has seen the loss, and what it takes to go back to it."""

    args: tuple[Any, ...]
    before: Snapshot
    settings: list[dict[str, Any]]


class StepsAhead:
    """Takes the steps of an SVI. On a GPU it launches them one after the other, and reads their losses later.

    The losses stay on the device. If a loss or a gradient is not finite, the optimiser skips this
    update and all that follow. So the parameters stay as they were before the bad step. When this is seen,
    buffers and random states go back to that point, and SVI takes the steps again, one by one. Its error
    names the site.

    It waits where it must: for the first step, on a CPU, in several processes, for an ELBO that is not
    compiled, for an optimiser that is not fused, and where hooks see a step or its gradients.

    Args:
        svi: the SVI that takes the steps.
        total: the sum of the losses so far, in nats.
    """

    def __init__(self, svi: SVI, total: float) -> None:
        self._svi, self._total = svi, total
        self._runs_ahead: bool | None = None  # decided after the first step, when the optimiser exists
        self._launched: list[_Launched] = []
        self._bytes = 0
        # On the device: each step's loss, and whether it was skipped, (2, STEPS); 1 after a bad step, ().
        self._results, self._skip = torch.empty(0), torch.empty(0)

    def take(self, args: tuple[Any, ...]) -> None:
        """Take a step, or launch it.

        Raises:
            ValueError: from SVI, also for a step that was launched before.
        """
        if self._runs_ahead is None:
            self._total += self._svi.step(*args)
            self._runs_ahead = _can_run_ahead(self._svi)
        elif self._runs_ahead:
            self._launch(args)
        else:
            self._total += self._svi.step(*args)

    def settle(self) -> float:
        """Wait for the steps that were launched; return the sum of all losses in nats.

        Raises:
            ValueError: from SVI, if one of the steps is not finite.
        """
        if self._launched:
            launched, self._launched, self._bytes = self._launched, [], 0
            losses, skips = self._results.tolist()
            done = skips[: len(launched)].count(0.0)
            for loss in losses[:done]:
                self._total += loss
            if skipped := launched[done:]:
                self._take_again(skipped)
        return self._total

    def _launch(self, args: tuple[Any, ...]) -> None:
        pair = Pair(self._svi.model, self._svi.guide, args)
        step = len(self._launched)
        if not step:
            device = parameters_of(self._svi.optimizer)[0].device
            self._results = torch.empty((2, STEPS), dtype=torch.float64, device=device)
            self._skip = torch.zeros((), device=device)
        kept = copied(args)
        launched = _Launched(kept, pair.snapshot(), self._settings())
        loss = self._svi._launch(self._skip, args)
        self._launched.append(launched)
        self._results[0, step].copy_(loss)
        self._results[1, step].copy_(self._skip)
        held = [*leaves(kept), *(buffer for _, _, buffer in pair.buffers)]
        self._bytes += sum(tensor.nbytes for tensor in held if isinstance(tensor, Tensor))
        if len(self._launched) == STEPS or self._bytes > BYTES:
            self.settle()

    def _take_again(self, skipped: list[_Launched]) -> None:
        """Take the steps that the optimiser has skipped, as if each had been waited for."""
        pair = Pair(self._svi.model, self._svi.guide, skipped[0].args)
        now, settings = pair.snapshot(), self._settings()
        skipped[0].before.restore()
        for step in skipped:
            step.before.restore(buffers=False)
            self._set(step.settings)
            self._total += self._svi.step(*step.args)
        # No step was bad: only the sum of its gradients overflows.
        now.restore(buffers=False)
        self._set(settings)

    def _settings(self) -> list[dict[str, Any]]:
        """Return the learning rates and other options of the optimiser, which a scheduler may change."""
        groups = self._svi.optimizer.param_groups
        settings = [{name: value for name, value in group.items() if name != "params"} for group in groups]
        return copied(settings)

    def _set(self, settings: list[dict[str, Any]]) -> None:
        for group, options in zip(self._svi.optimizer.param_groups, settings, strict=True):
            group.update(options)


def _can_run_ahead(svi: SVI) -> bool:
    trained = parameters_of(svi.optimizer)
    on_one_device = len({p.device for p in trained}) == 1 and trained[0].device.type == DEVICE
    if not on_one_device or "add_gradients" not in vars(type(svi.loss)):
        return False
    # Slow to import, and a CompiledELBO has done so.
    from pyro_vae.compiled.internals import hooks_on_parameter, hooks_on_step, skips_on_request

    return (
        not svi.loss.check
        and type(svi).step is SVI.step
        and processes.count() == 1
        and skips_on_request(svi.optimizer)
        and not hooks_on_step(svi.optimizer)
        and not any(map(hooks_on_parameter, parameters(svi.model, svi.guide)))
    )
