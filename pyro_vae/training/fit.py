"""fit: train, and yield a record after each epoch."""

import math
import re
import time
import warnings
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from pyro_vae.arguments import check_flag, given, require, whole_number
from pyro_vae.evaluation import elbo_terms
from pyro_vae.evaluation.chunks import chunks
from pyro_vae.evaluation.evidence import elbo_of_plates
from pyro_vae.interrupts import deferred
from pyro_vae.programs import Batch, Pair, as_args
from pyro_vae.programs.pair import copied
from pyro_vae.programs.traces import EvaluationError
from pyro_vae.progress_bar import progress_bar
from pyro_vae.svi import SVI
from pyro_vae.training.ahead import StepsAhead
from pyro_vae.training.checkpoint import Checkpoint
from pyro_vae.training.epoch import Epoch
from pyro_vae.training.progress import Progress

# Enough data points for a mean ELBO with an error of about one nat, at little cost next to an epoch.
_WATCHED_DATA = 1000
_NO_ELBO = (math.nan, math.nan, math.nan)


def fit(
    svi: SVI,
    batches: Iterable[Batch],
    epochs: int,
    *,
    watch: Batch | None = None,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    progress: bool = True,
    checkpoint: Checkpoint | None = None,
) -> Iterator[Epoch]:
    """Train, and yield a record after each pass over the batches.

    Leave the loop with ``break`` to stop early.

    ::

        for epoch in fit(svi, batches, epochs=20):
            print(epoch)

    Args:
        svi: the SVI that takes the steps.
        batches: iterated once per epoch: a list, a DataLoader, :class:`pyro_vae.data.Batches`. A
            batch holds the arguments of ``svi.step(*batch)``: a tensor, or a tuple or list of arguments.
        epochs: the number of passes.
        watch: a batch whose ELBO is computed after each pass, with the same noise each time. By default,
            the first thousand data points of the first pass.
        scheduler: a torch learning-rate scheduler of ``svi.optimizer``; it steps after each update.
        checkpoint: the file that keeps the training, and from which it resumes. Ctrl-C and SIGTERM then wait
            for the end of a step, and the file is written before they act. It is also written when the
            batches of a pass are done, and again when the loop asks for the next pass.
        progress: whether to show a progress bar on standard error, in a terminal or a notebook; never in a
            file. The bar is removed at the end of an epoch.

    Yields:
        An :class:`Epoch`.

    Raises:
        ValueError: when ``fit`` is called, if epochs is not positive, batches can be iterated only once,
            watch is no batch, or the scheduler belongs to another optimiser. During training, if an epoch
            has no batch, or if ``svi.step`` raises it.
    """
    epochs = whole_number("epochs", epochs, 1, "pass the number of passes over the data, such as 10")
    check_flag("progress", progress)
    require(isinstance(svi, SVI), "svi", "a pyro_vae.SVI", type(svi).__name__, "make one of model and guide")
    if not isinstance(batches, Iterable):
        raise ValueError(
            f"batches: expected an iterable of batches, got {type(batches).__name__}. To fix: pass a list, a "
            "DataLoader or pyro_vae.data.Batches."
        )
    if isinstance(batches, Tensor):
        raise ValueError(
            "batches: expected an iterable of batches, got one tensor. Each of its rows would be taken as a "
            "batch. To fix: split it, such as x.split(128)."
        )
    if epochs > 1 and isinstance(batches, Iterator):
        raise ValueError(
            "batches: expected an iterable that can be iterated once per epoch, got an iterator "
            f"({type(batches).__name__}), which would be empty in its second epoch. To fix: pass a list, a "
            "DataLoader or pyro_vae.data.Batches."
        )
    if watch is not None and not isinstance(watch, Tensor | tuple | list):
        raise ValueError(
            f"watch: expected one batch, a tensor or a tuple of the arguments of the model, got "
            f"{type(watch).__name__}. To fix: pass the images that you watch, such as "
            "pyro_vae.data.observe(images, protocol)."
        )
    if scheduler is not None:
        kind = torch.optim.lr_scheduler.LRScheduler
        if not isinstance(scheduler, kind) or isinstance(scheduler, ReduceLROnPlateau):
            raise ValueError(
                "scheduler: expected a torch learning-rate scheduler that steps without a metric, got "
                f"{type(scheduler).__name__}. To fix: pass such a scheduler. If yours needs a metric, step "
                "it in your loop over fit."
            )
        if scheduler.optimizer is not svi.optimizer:
            raise ValueError(
                "scheduler: expected a scheduler of svi.optimizer, got one of another optimiser. To fix: "
                "make the scheduler from svi.optimizer."
            )
    if checkpoint is not None:
        require(
            isinstance(checkpoint, Checkpoint),
            "checkpoint",
            "a Checkpoint",
            given(checkpoint),
            "pv.Checkpoint(path)",
        )
        if isinstance(batches, Iterator):
            raise ValueError(
                "batches: expected an iterable that starts again, since a checkpoint goes on with it, got an "
                f"iterator ({type(batches).__name__}). To fix: pass a list, a DataLoader or "
                "pyro_vae.data.Batches."
            )
    return _epochs(svi, batches, epochs, watch, scheduler, progress, checkpoint)


def _epochs(
    svi: SVI,
    batches: Iterable[Batch],
    epochs: int,
    watch: Batch | None,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None,
    shows_bar: bool,
    checkpoint: Checkpoint | None,
) -> Iterator[Epoch]:
    progress = Progress(svi, batches, scheduler, checkpoint)
    is_first = True
    for epoch in range(progress.position.epoch + 1, epochs + 1):
        position = progress.position
        watched = position.watched if watch is None else [as_args(watch)]
        start, stops = time.perf_counter() - position.seconds, False
        steps = StepsAhead(svi, position.total)
        with (
            _naming_workers(),
            deferred(*progress.signals, urgent=True) as request,
            progress_bar(
                progress.rest_of_pass(),
                desc=f"epoch {epoch}/{epochs}",
                initial=position.batch,
                total=progress.num_batches,
                shows=shows_bar,
            ) as bar,
        ):
            for batch in bar:
                args = as_args(batch)
                if watch is None and epoch == 1 and sum(len(w[0]) for w in watched) < _WATCHED_DATA:
                    watched.append(copied(args))  # a loader may use its memory again
                if is_first:
                    _check_last_batch(svi, batches, args)
                    # A batch that does not fit raises before training.
                    position.reports = _mean_terms(svi, watched) is not _NO_ELBO
                    bar.set_postfix_str("first step: checks, and compilation for a CompiledELBO")
                steps.take(args)
                position.count += svi.num_data(*args)
                position.batch += 1
                if is_first:
                    bar.set_postfix_str("")
                    is_first = False
                if scheduler is not None:
                    scheduler.step()
                position.seconds = time.perf_counter() - start
                if stops := progress.after_step(steps, request.number is not None):
                    break
            position.total = steps.settle()
        if stops:
            progress.stop(request)
        if not position.count:
            raise ValueError(
                f"batches: expected at least one batch in each epoch, got none in epoch {epoch}. To fix: "
                "pass an iterable that is not empty and starts again from the first batch in each epoch."
            )
        progress.end_pass()
        terms = _mean_terms(svi, watched) if position.reports else _NO_ELBO
        position.reports = terms is not _NO_ELBO
        record = Epoch(epoch, position.total / position.count, *terms, position.seconds)
        if checkpoint is not None:
            checkpoint.epochs.append(record)
        yield record
        progress.start_next_pass()


@contextmanager
def _naming_workers() -> Iterator[None]:
    """Say what to do if a process that reads the data dies."""
    try:
        yield
    except RuntimeError as error:
        if not re.match(r"DataLoader worker .* (exited unexpectedly|is killed)", str(error)):
            raise
        raise RuntimeError(
            f"batches: expected the processes that read the data to stay alive, got: {error} To fix: check "
            "the memory of the machine, take fewer workers (num_workers=0 shows an error of the data set), "
            "and resume."
        ) from error


def _check_last_batch(svi: SVI, batches: Any, args: tuple[Any, ...]) -> None:
    """Check a batch of one before training, if the last batch will be one: BatchNorm cannot take it."""
    size, data = getattr(batches, "batch_size", None), getattr(batches, "dataset", None)
    if size is None or not isinstance(data, Sized) or len(data) % size != 1 or batches.drop_last:
        return
    svi.num_data(*next(chunks(Pair(svi.model, svi.guide, args), 1)).args)


def _mean_terms(svi: SVI, watched: list[tuple[Any, ...]]) -> tuple[float, float, float]:
    """Return ELBO, reconstruction and KL per data point; NaN and a warning if the pair has none."""
    # The same noise after each epoch; the random numbers of the training are not touched.
    with Pair(svi.model, svi.guide).trial():
        torch.manual_seed(0)
        try:
            each = [elbo_terms(svi.model, svi.guide, batch) for batch in watched]
            elbo, reconstruction, kl = (float(torch.cat(parts).mean()) for parts in zip(*each, strict=True))
            return elbo, reconstruction, kl
        except EvaluationError:
            torch.manual_seed(0)
        try:
            count = sum(svi.num_data(*batch) for batch in watched)
            totals = [elbo_of_plates(svi.model, svi.guide, batch) for batch in watched]
        except EvaluationError as error:
            warnings.warn(f"fit trains, but records no ELBO. {error}", stacklevel=3)
            return _NO_ELBO
    elbo, reconstruction, kl = (sum(parts) / count for parts in zip(*totals, strict=True))
    return elbo, reconstruction, kl
