"""Progress: how far a training is, kept in its checkpoint, and how it resumes from there."""

import signal
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

from torch.utils.data import DataLoader, IterableDataset

from pyro_vae.data import Batches
from pyro_vae.interrupts import StopRequest
from pyro_vae.programs import Batch, Pair, as_args
from pyro_vae.svi import SVI
from pyro_vae.training import processes
from pyro_vae.training.ahead import StepsAhead
from pyro_vae.training.checkpoint import Checkpoint
from pyro_vae.training.random_states import random_states, set_random_states


@dataclass
class Position:
    """How far a training is.

    Attributes:
        epoch: the number of complete passes.
        batch: the number of batches done in the next pass.
        is_over: whether these are all batches of the pass.
        total: the sum of their losses, in nats.
        count: the number of data points in them.
        seconds: the time that they took.
        watched: the batches of the first pass whose ELBO is reported.
        reports: whether the pair has an ELBO to report.
        at_start: the random states at the start of the pass.
        now: the random states.
    """

    epoch: int = 0
    batch: int = 0
    is_over: bool = False
    total: float = 0.0
    count: int = 0
    seconds: float = 0.0
    watched: list[tuple[Any, ...]] = field(default_factory=list)
    reports: bool = True
    at_start: dict[str, Any] = field(default_factory=dict)
    now: dict[str, Any] = field(default_factory=dict)


class Progress:
    """The position of a training, which goes into its checkpoint, if it has one.

    Args:
        svi: the SVI that takes the steps.
        batches: the batches of a pass.
        scheduler: the scheduler of the learning rate, or None.
        checkpoint: the file to write, and to resume from if it has been read; None keeps nothing.
    """

    def __init__(
        self, svi: SVI, batches: Iterable[Batch], scheduler: Any, checkpoint: Checkpoint | None
    ) -> None:
        self._svi, self._batches, self._scheduler, self._checkpoint = svi, batches, scheduler, checkpoint
        self._pair = Pair(svi.model, svi.guide)
        self.position = Position()
        if checkpoint is not None and self._pair.trainable:
            checkpoint.note_options(svi.optimizer)
        if checkpoint is not None and checkpoint.resumes:
            self._make_parameters(checkpoint)
            positions = checkpoint.restore(svi, scheduler, self._data)
            self.position = Position(**positions[processes.rank()])
            self._set_random_states(self.position.now)

    @property
    def num_batches(self) -> int | None:
        """The number of batches of a pass, None if it is not known."""
        try:
            return len(self._batches)  # type: ignore[arg-type]
        except TypeError:  # also from a DataLoader whose data set has no length
            return None

    @property
    def _data(self) -> dict[str, Any]:
        """What a resumed training has to have in common with the batches."""
        protocol = str(self._batches.protocol) if isinstance(self._batches, Batches) else None
        return {"batches": self.num_batches, "protocol": protocol}

    @property
    def signals(self) -> tuple[int, ...]:
        """The signals that wait for the end of a step, so that the checkpoint can be written."""
        return () if self._checkpoint is None else (signal.SIGINT, signal.SIGTERM)

    def rest_of_pass(self) -> Iterator[Batch]:
        """Return the batches of the pass that are not done."""
        position = self.position
        if position.is_over:
            return iter(())
        if not position.batch:
            if self._checkpoint is not None:
                position.at_start = self._random_states()
            return iter(self._batches)
        # The same order, and the same noise in the batches, as in the pass that was interrupted.
        self._set_random_states(position.at_start)
        batches = iter(self._batches)
        for _ in range(position.batch):
            next(batches)
        self._set_random_states(position.now)
        return batches

    def after_step(self, steps: StepsAhead, is_asked_to_stop: bool) -> bool:
        """Write the checkpoint if it is due, or if a process has to stop; return whether one has to."""
        checkpoint = self._checkpoint
        if checkpoint is None:
            return False
        stops = processes.any_of(is_asked_to_stop)
        is_time = checkpoint.every is not None and self.position.batch % checkpoint.every == 0
        if self._comes_again and (is_time or stops):
            self.position.total = steps.settle()
            self._write(checkpoint)
        return stops

    def end_pass(self) -> None:
        """Note that all batches of the pass are done."""
        self.position.is_over = True
        if self._checkpoint is not None:
            self._write(self._checkpoint)

    def start_next_pass(self) -> None:
        """Note that a pass is done and recorded."""
        position = self.position
        self.position = Position(position.epoch + 1, watched=position.watched, reports=position.reports)
        if self._checkpoint is not None:
            self._write(self._checkpoint)

    @property
    def _comes_again(self) -> bool:
        """Whether the batches of a pass come again in the same order from the same random states."""
        if isinstance(self._batches, DataLoader):
            return not (
                isinstance(self._batches.dataset, IterableDataset) or self._batches.persistent_workers
            )
        return isinstance(self._batches, Batches | list | tuple)

    def _random_states(self) -> dict[str, Any]:
        return random_states(self._pair, self._batches)

    def _set_random_states(self, states: dict[str, Any]) -> None:
        set_random_states(states, self._pair, self._batches)

    def _make_parameters(self, checkpoint: Checkpoint) -> None:
        """Make the parameters of an autoguide or a lazy layer, which need a first use."""
        if not checkpoint.has_more_parameters(self._svi):
            return
        before = self._random_states()
        self._svi.num_data(*as_args(next(iter(self._batches))))
        self._set_random_states(before)
        self._pair = Pair(self._svi.model, self._svi.guide)
        self._svi._optimised(self._pair)

    def _write(self, checkpoint: Checkpoint) -> None:
        self.position.now = self._random_states()
        positions = processes.gathered(vars(self.position))
        if processes.rank() == 0:
            checkpoint.write(self._svi, self._scheduler, positions, self._data)

    def stop(self, request: StopRequest) -> NoReturn:
        """Say what the checkpoint holds, and do what the signal does, here or in another process."""
        if processes.rank() == 0:
            print(self._how_to_go_on(), file=sys.stderr)
        request.obey()
        raise SystemExit(128 + signal.SIGTERM)

    def _how_to_go_on(self) -> str:
        position, checkpoint = self.position, self._checkpoint
        assert checkpoint is not None
        where = f"{position.epoch} epochs"
        if self._comes_again:
            where += f" and {position.batch} batches"
        elif not position.epoch:
            return "Stopped. Nothing is saved: batches of this kind resume only at the start of an epoch."
        return f"Stopped. {checkpoint.path} holds the training after {where}. To go on, resume it."
