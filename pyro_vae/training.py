"""Training: a generator of epochs."""

import sys
import time
from collections.abc import Iterable, Iterator
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau
from tqdm import tqdm

from pyro_vae.evaluation import elbo_terms
from pyro_vae.programs import Batch, Pair, as_args
from pyro_vae.svi import SVI

# Enough data for a mean ELBO within about a nat, few enough to cost nothing beside an epoch.
_WATCHED = 1000


class Epoch(NamedTuple):
    """What one pass over the data did, all in nats a datum.

    Attributes:
        epoch: 1 for the first.
        loss: the mean training loss, each batch's taken before its update.
        elbo: the plain ELBO after the pass, on the data watched: reconstruction - kl.
        reconstruction: its part E_q[log p(x | z)].
        kl: its part E_q[log q(z | x) - log p(z)].
        seconds: the wall-clock time of the pass, without the evaluation.
    """

    epoch: int
    loss: float
    elbo: float
    reconstruction: float
    kl: float
    seconds: float

    def __str__(self) -> str:
        return (
            f"epoch {self.epoch:3d}   loss {self.loss:9.3f}   ELBO {self.elbo:9.3f} = "
            f"{self.reconstruction:9.3f} - KL {self.kl:7.3f} nats a datum   {self.seconds:.1f} s"
        )


def fit(
    svi: SVI,
    batches: Iterable[Batch],
    epochs: int,
    *,
    watch: Batch | None = None,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    progress: bool = True,
) -> Iterator[Epoch]:
    """Train, yielding a record after each pass over the batches; leave early by ``break``.

    ::

        for epoch in fit(svi, batches, epochs=20):
            print(epoch)

    Args:
        svi: steps on a batch.
        batches: iterated once an epoch: a list, a DataLoader, :class:`pyro_vae.data.Batches`. A
            batch is what ``svi.step(*batch)`` takes: a tensor, or a tuple or list of arguments.
        epochs: how many passes.
        watch: a batch whose ELBO is taken after every pass, with the same noise each time; if not
            given, the first thousand data of the first pass.
        scheduler: a torch learning-rate scheduler of ``svi.optimizer``, stepped with every update.
        progress: whether a progress bar runs; it goes to standard error and is not kept.

    Yields:
        An :class:`Epoch`.

    Raises:
        ValueError: at once, if epochs is not positive, batches can be iterated only once, or the
            scheduler belongs to another optimiser; while training, if an epoch has no batches and
            as ``svi.step``.
    """
    if not isinstance(epochs, Integral) or epochs < 1:
        raise ValueError(f"epochs is a positive whole number, got {epochs}.")
    if not isinstance(batches, Iterable):
        raise ValueError(f"batches is an iterable of batches, got {type(batches).__name__}.")
    if isinstance(batches, Tensor):
        raise ValueError(
            "batches is an iterable of batches, got one tensor, whose rows would each be taken for "
            "a batch. Split it: x.split(128)."
        )
    if epochs > 1 and isinstance(batches, Iterator):
        raise ValueError(
            f"batches is an iterator ({type(batches).__name__}), which would be empty in its second "
            "epoch. Expected what can be iterated anew: a list, a DataLoader, pyro_vae.data.Batches."
        )
    if scheduler is not None:
        kind = torch.optim.lr_scheduler.LRScheduler
        if not isinstance(scheduler, kind) or isinstance(scheduler, ReduceLROnPlateau):
            raise ValueError(
                "scheduler expects a torch learning-rate scheduler that steps by itself, got "
                f"{type(scheduler).__name__}. Step one that looks at a metric in the loop over fit."
            )
        if scheduler.optimizer is not svi.optimizer:
            raise ValueError("scheduler belongs to another optimiser. Expected one made of svi.optimizer.")
    return _epochs(svi, batches, epochs, watch, scheduler, progress)


def _epochs(
    svi: SVI,
    batches: Iterable[Batch],
    epochs: int,
    watch: Batch | None,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None,
    progress: bool,
) -> Iterator[Epoch]:
    watched = [] if watch is None else [as_args(watch)]
    for epoch in range(1, epochs + 1):
        start, total, count = time.perf_counter(), 0.0, 0
        with tqdm(
            batches,
            desc=f"epoch {epoch}/{epochs}",
            leave=False,
            disable=not progress,
            mininterval=0.1 if sys.stderr.isatty() else 10,  # a log file keeps every line of it
        ) as bar:
            for batch in bar:
                args = as_args(batch)
                if watch is None and epoch == 1 and sum(len(w[0]) for w in watched) < _WATCHED:
                    watched.append(args)
                first = epoch == 1 and not count
                if first:
                    _mean_terms(svi, watched)  # what cannot be evaluated says so before it is trained
                    bar.set_postfix_str("first step: checked, and compiled where asked for")
                total += svi.step(*args)
                if first:
                    bar.set_postfix_str("")
                count += svi.num_data(*args)
                if scheduler is not None:
                    scheduler.step()
        if not count:
            raise ValueError(
                f"batches had no batch in epoch {epoch}. Expected an iterable that starts anew at "
                "every epoch, with one batch or more."
            )
        seconds = time.perf_counter() - start
        yield Epoch(epoch, total / count, *_mean_terms(svi, watched), seconds)


def _mean_terms(svi: SVI, watched: list[tuple[Any, ...]]) -> tuple[float, float, float]:
    # The same noise after each epoch, and none of it taken from the training's.
    with Pair(svi.model, svi.guide).trial():
        torch.manual_seed(0)
        terms = [elbo_terms(svi.model, svi.guide, batch) for batch in watched]
    elbo, reconstruction, kl = (float(torch.cat(parts).mean()) for parts in zip(*terms, strict=True))
    return elbo, reconstruction, kl
