"""Draw a loss and its gradient many times, and leave model and guide as they were."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae.programs import Pair
from pyro_vae.programs.snapshot import Snapshot
from pyro_vae.svi import SVI

Loss = Callable[..., Tensor]  # (model, guide, *batch) -> the loss in nats, differentiable


class RunningMoments:
    """Mean and variance of numbers or vectors that are added one at a time, in float64 (Welford 1962)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros((), dtype=torch.float64)
        self._squares = torch.zeros((), dtype=torch.float64)  # sum of (x - mean)^2

    def add(self, x: Tensor) -> None:
        """Add one number or vector."""
        self.count += 1
        delta = x - self.mean
        self.mean = self.mean + delta / self.count
        self._squares = self._squares + delta * (x - self.mean)

    @property
    def variance(self) -> Tensor:
        """The unbiased sample variance."""
        return self._squares / (self.count - 1)


class Draws:
    """Draws of one loss: its value in nats, summed over the data; its flat gradient; the seconds it took."""

    def __init__(self) -> None:
        self.loss, self.gradient = RunningMoments(), RunningMoments()
        self.seconds: list[float] = []

    def add(self, loss: float, gradient: Tensor, seconds: float) -> None:
        """Add one draw."""
        self.loss.add(torch.tensor(loss, dtype=torch.float64))
        self.gradient.add(gradient)
        self.seconds.append(seconds)


@contextmanager
def restore_afterwards(pair: Pair) -> Iterator[Snapshot]:
    """Restore gradients, buffers and the random state at the end."""
    before = pair.snapshot()
    gradients = [p.grad for p in pair.trainable]
    try:
        yield before
    finally:
        before.restore()
        for p, gradient in zip(pair.trainable, gradients, strict=True):
            p.grad = gradient


def draw_estimators(
    svis: dict[str, SVI],
    pair: Pair,
    seeds: list[int],
    before: Snapshot,
) -> dict[str, Draws]:
    """Draw each estimator once per seed, in turns."""

    def draw(name: str, seed: int) -> tuple[float, float]:
        before.restore(random_state=False)
        torch.manual_seed(seed)
        start = time.perf_counter()
        with errors_with_name(name):
            loss = svis[name].step(*pair.args)  # reads the loss and gradients, so a device has finished them
        return loss, time.perf_counter() - start

    names = list(svis)
    for name in names:
        draw(name, 0)  # not timed: work that is done once, such as compiling, is not the cost of a step
    draws = {name: Draws() for name in names}
    for turn, seed in enumerate(seeds):
        first = turn % len(names)  # another estimator starts each turn
        for name in names[first:] + names[:first]:
            loss, seconds = draw(name, seed)
            draws[name].add(loss, _flat_gradient(pair.trainable, [p.grad for p in pair.trainable]), seconds)
    return draws


def draw_target(
    name: str,
    target: Loss,
    pair: Pair,
    seeds: list[int],
    before: Snapshot,
) -> Draws:
    """Draw the target of the named estimator once per seed, and twice if it has no noise."""
    draws = Draws()
    for seed in seeds:
        before.restore(random_state=False)
        torch.manual_seed(seed)
        with pair.isolated(validate=False):
            loss = _checked_loss(name, target(pair.model, pair.guide, *pair.args))
            gradients = torch.autograd.grad(loss, pair.trainable, allow_unused=True)
        draws.add(loss.item(), _flat_gradient(pair.trainable, gradients), seconds=0.0)
        if draws.loss.count == 2 and not draws.loss.variance and not draws.gradient.variance.any():
            break  # a closed form, without noise
    return draws


class NoUpdate(torch.optim.Optimizer):
    """An optimiser that changes no parameter, so that a step of SVI only computes gradients."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Do nothing."""


@contextmanager
def errors_with_name(name: str) -> Iterator[None]:
    """Put the name of the estimator before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"Estimator '{name}': {error}") from error


def _flat_gradient(trainable: list[nn.Parameter], gradients: Iterable[Tensor | None]) -> Tensor:
    """Return the gradients as one float64 vector, with zeros for a parameter that has none."""
    return torch.cat(
        [
            torch.zeros(p.numel(), dtype=torch.float64)
            if g is None
            else g.detach().to_dense().flatten().to("cpu", torch.float64)
            for p, g in zip(trainable, gradients, strict=True)
        ]
    )


def _checked_loss(name: str, loss: Any) -> Tensor:
    """Return the result of a target if it is a loss that can be differentiated."""
    if not isinstance(loss, Tensor) or loss.dim() or not loss.requires_grad or not loss.isfinite():
        raise ValueError(
            f"targets['{name}']: expected the function to return a finite differentiable tensor of shape (), "
            f"the loss in nats summed over the data, got {loss!r}. To fix: return such a tensor."
        )
    return loss
