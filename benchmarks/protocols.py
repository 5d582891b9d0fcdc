"""The four protocols: steps, epochs, training, and growth of the cost.

In each protocol the contenders take turns, round after round, so that a slow moment of the machine
affects all of them. The results are the median over rounds, and the median of the ratios within a round.
Each protocol also compares the losses, so that a contender that does other work is not timed.
"""

import math
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from contenders import CONTENDERS, YARDSTICKS, Weights, Work
from process import Process, processes

Row = dict[str, Any]
Turns = dict[str, list[float]]  # contender -> one number per round


class Size(NamedTuple):
    """How much is measured.

    Attributes:
        rounds: turns of each contender in the protocol of steps.
        images: the number of images in the steps of one turn, for any batch size.
        epochs: the largest number of epochs in training.
        target: training stops at this ELBO on test data, in nats per data point.
        points: the largest number of values on an axis of growth.
    """

    rounds: int = 9
    images: int = 2560
    epochs: int = 14
    target: float = -105.0
    points: int = 4


def steps(names: list[str], work: Work, batches: list[int], threads: int, size: Size) -> list[Row]:
    """Measure the milliseconds of a step on a batch that stays in memory, for several batch sizes."""
    rows = []
    with processes(names, threads) as contenders:
        for batch in batches:
            at = work._replace(batch=batch)
            times, firsts = _time_steps(contenders, at, size, f"threads {threads}, batch {batch}")
            for name in names:
                ms = 1e3 * median(times[name])
                row: Row = {"threads": threads, "batch": batch, "contender": name}
                row |= {"ms": round(ms, 3), "images/s": round(1e3 * batch / ms)}
                rows.append(row | _ratios(times, name) | {"first step, s": round(firsts[name], 2)})
    return rows


def _time_steps(
    contenders: dict[str, Process], work: Work, size: Size, title: str
) -> tuple[Turns, dict[str, float]]:
    """Return the seconds of a step in each round, and the seconds until the first step is done."""
    number = max(3, size.images // (work.batch * work.particles))
    firsts: dict[str, float] = {}
    first_losses: dict[str, float | None] = {}
    losses: dict[str, float | None] = {}
    for name, contender in tqdm(contenders.items(), desc=f"{title}, first steps"):
        made = contender.make(work)
        loss, seconds = contender.run("steps", 1)
        firsts[name], first_losses[name] = made + seconds, loss
        contender.run("steps", number)
    times: Turns = {name: [] for name in contenders}
    for _ in tqdm(range(size.rounds), desc=f"{title}, rounds"):
        for name, contender in contenders.items():
            contender.run("steps", 2)  # fills the processor's caches again
            losses[name], seconds = contender.run("steps", number)
            times[name].append(seconds / number)
    _check_same_work(first_losses, 0.01, "the first step")
    _check_same_work(losses, 0.2, "the last step")
    for name, loss in losses.items():
        if loss is not None:
            weights, _ = contenders[name].run("weights")
            _check_loss(name, loss, -elbo_on_test(weights, work.observed(), softplus=False))
    return times, firsts


def training(names: list[str], work: Work, test: NDArray[np.uint8], threads: int, size: Size) -> list[Row]:
    """Measure seconds per epoch on the contender's own data path, peak memory, and seconds to the target."""
    x = binarised(test)
    initial = elbo_on_test(work.weights(), x, softplus=False)
    with processes(names, threads) as contenders:
        seconds: Turns = {}
        for name, contender in tqdm(contenders.items(), desc="start"):
            seconds[name] = [contender.make(work)]
        elbos: Turns = {name: [initial] for name in names}
        for epoch in range(size.epochs):
            # The first epoch compiles; at least two more are needed to measure the cost of an epoch.
            going = [name for name in names if epoch < 3 or max(elbos[name]) < size.target]
            for name in tqdm(going, desc=f"epoch {epoch + 1}"):
                seconds[name].append(contenders[name].run("epoch")[1])
                weights, _ = contenders[name].run("weights")
                elbos[name].append(elbo_on_test(weights, x, softplus=CONTENDERS[name].softplus))
            if epoch == 0:
                reached: dict[str, float | None] = {name: -elbos[name][1] for name in names}
                binary = {name: loss for name, loss in reached.items() if not CONTENDERS[name].grey}
                _check_same_work(binary, 0.05, "the first epoch")
                _check_same_work(reached, 0.25, "the first epoch")
        memory = {name: contender.peak_memory() for name, contender in contenders.items()}
    epochs = {name: each[2:] for name, each in seconds.items()}
    rows = []
    for name in names:
        row: Row = {"threads": threads, "seed": work.seed, "contender": name}
        row |= {"epoch, s": round(median(epochs[name]), 3)}
        row |= _ratios(epochs, name) | {"first epoch, s": round(sum(seconds[name][:2]), 2)}
        to_target = _seconds_to(size.target, seconds[name], elbos[name])
        row["to target, s"] = None if to_target is None else round(to_target, 2)
        row |= {"peak memory, MB": round(memory[name])}
        row |= {"epochs": len(elbos[name]) - 1, "test ELBO": round(elbos[name][-1], 2)}
        rows.append(row)
    return rows


def _seconds_to(target: float, seconds: list[float], elbos: list[float]) -> float | None:
    """Interpolate between the ends of two epochs. Return None if the target was not reached."""
    total = np.cumsum(seconds)
    for i, elbo in enumerate(elbos):
        if elbo >= target:
            share = (target - elbos[i - 1]) / (elbo - elbos[i - 1])
            return float(total[i - 1] + share * (total[i] - total[i - 1]))
    return None


# The first value of each axis is the default.
AXES = {
    "batch": [128, 32, 512, 2048],
    "latent": [20, 2, 80, 320],
    "particles": [1, 4, 16, 64],
    "images": [60_000, 30_000, 15_000],
}


def growth(names: list[str], work: Work, size: Size) -> list[Row]:
    """Measure the time on one thread while one number grows; the others stay as in `work`.

    It is the time of a step; for `images`, that of an epoch.
    """
    rows = []
    with processes(names, 1) as contenders:
        points = [(axis, value) for axis, values in AXES.items() for value in sorted(values[: size.points])]
        for axis, value in points:
            changed: dict[str, Any] = {axis: min(value, work.images) if axis == "images" else value}
            at = work._replace(**changed)
            title = f"{axis} {getattr(at, axis)}"
            times = (
                _time_epochs(contenders, at, title)
                if axis == "images"
                else _time_steps(contenders, at, size, title)[0]
            )
            unit, factor = ("s an epoch", 1.0) if axis == "images" else ("ms a step", 1e3)
            for name in names:
                row: Row = {"axis": axis, "value": getattr(at, axis), "contender": name}
                rows.append(row | {"time": round(factor * median(times[name]), 3), "unit": unit})
    return rows


def epochs(names: list[str], work: Work, batches: list[int], threads: int, size: Size) -> list[Row]:
    """Measure the seconds of an epoch on the contender's own data path, for several batch sizes."""
    rows = []
    with processes(names, threads) as contenders:
        for batch in batches:
            title, rounds = f"threads {threads}, batch {batch}", (size.rounds + 1) // 2
            times = _time_epochs(contenders, work._replace(batch=batch), title, rounds)
            for name in names:
                row: Row = {"threads": threads, "batch": batch, "contender": name}
                rows.append(row | {"epoch, s": round(median(times[name]), 3)} | _ratios(times, name))
    return rows


def _time_epochs(contenders: dict[str, Process], work: Work, title: str, rounds: int = 2) -> Turns:
    """Return the seconds of an epoch in each round, after a first epoch that compiles."""
    times: Turns = {name: [] for name in contenders}
    losses: dict[str, float | None] = {}
    for contender in contenders.values():
        contender.make(work)
    for _ in tqdm(range(1 + rounds), desc=title):
        for name, contender in contenders.items():
            losses[name], seconds = contender.run("epoch")
            times[name].append(seconds)
    _check_same_work(losses, 0.1, "the last epoch")
    return {name: each[1:] for name, each in times.items()}


def binarised(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Draw binary pixels (dynamic binarisation), the same ones for all evaluations."""
    return (np.random.default_rng(0).random(pixels.shape) < pixels / 255).astype(np.float32)


def elbo_on_test(weights: Weights, x: NDArray[np.float32], *, softplus: bool) -> float:
    """Return the one-sample ELBO of the weights, in nats per data point; the noise is always the same."""

    def network(h: NDArray[Any], layers: Weights) -> NDArray[Any]:
        hidden = h @ layers[0] + layers[1]
        active = np.logaddexp(0, hidden) if softplus else np.maximum(hidden, 0)
        return active @ layers[2] + layers[3]

    mean, log_sigma = np.split(network(x, weights[:4]), 2, -1)
    sigma = np.exp(log_sigma)
    noise = np.random.default_rng(1).standard_normal(mean.shape, dtype=np.float32)
    logits = network(mean + sigma * noise, weights[4:])
    reconstruction = (x * logits - np.logaddexp(0, logits)).sum(-1)
    kl = 0.5 * (sigma**2 + mean**2 - 1 - 2 * log_sigma).sum(-1)
    return float((reconstruction - kl).mean())


def _check_same_work(losses: dict[str, float | None], tolerance: float, when: str) -> None:
    """Check that no contender's loss is far from the others'.

    Raises:
        ValueError: with the name of the contender.
    """
    compared = {name: loss for name, loss in losses.items() if loss is not None}
    middle = median([loss for loss in compared.values() if math.isfinite(loss)] or [math.nan])
    for name, loss in compared.items():
        if not abs(loss - middle) <= tolerance * middle:
            raise ValueError(
                f"{name} does other work than the rest: expected a loss of {middle:.2f} nats per data point "
                f"after {when}, within {tolerance:.0%}, got {loss:.2f}. Its times would have no meaning. To "
                "fix: give it the same work, or leave it out by --contenders."
            )


def _check_loss(name: str, loss: float, expected: float) -> None:
    """Check that a contender reports the loss of its weights; the weights are one step later.

    Raises:
        ValueError: with the name of the contender.
    """
    if not abs(loss - expected) <= 0.1 * expected:
        raise ValueError(
            f"{name} minimises something else: expected the loss of its weights, {expected:.2f} nats per "
            f"data point, within 10%, got {loss:.2f}. Its times would have no meaning. To fix: make it "
            "minimise the negative ELBO, or leave it out by --contenders."
        )


def _ratios(times: Turns, name: str) -> Row:
    """Return the time divided by each yardstick's in the same round: the median over their common rounds."""
    ratios = {}
    for short, other in YARDSTICKS.items():
        if other in times:
            pairs = zip(times[name], times[other], strict=False)
            ratios[f"x {short}"] = round(median(mine / its for mine, its in pairs), 3)
    return ratios
