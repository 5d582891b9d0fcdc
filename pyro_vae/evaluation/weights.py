"""Importance weights: log p(x, z) - log q(z | x) of many draws, for one part of the data after the other."""

import functools
import math
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.evaluation.checks import check_no_points
from pyro_vae.evaluation.chunks import checked_chunks, chunks
from pyro_vae.programs import Pair, Traces
from pyro_vae.programs.faults import locate
from pyro_vae.programs.pair import leaves, map_leaves
from pyro_vae.programs.plates import PlateLayout, find_layout
from pyro_vae.programs.traces import density_sites, latent_sites, per_data_point
from pyro_vae.progress_bar import progress_bar

# Data times samples in one pass, and the samples of one data point. They are so large that handlers and guide
# cost little compared with the decoder's matrix products. They are so small that the results of the products
# stay in the processor's cache.
ROWS, SAMPLES = 2048, 128
# On a GPU the launches of a pass cost more than its memory: this many times as many rows.
_GPU_FACTOR = 32


def rows_at_once(pair: Pair) -> int:
    """Return how many data times samples run in one pass, on the device of the batch."""
    on_cpu = all(leaf.device.type == "cpu" for leaf in leaves(pair.args) if isinstance(leaf, Tensor))
    return ROWS if on_cpu else _GPU_FACTOR * ROWS


def draw_weights(
    pair: Pair,
    num_samples: int,
    weigh: Callable[..., Any] | None = None,
    *,
    compiled: bool = False,
    side_by_side: int | None = None,
) -> Iterator[tuple[slice, Iterator[Any]]]:
    """Draw the log importance weights of a pair in eval mode, in blocks of data and samples.

    Args:
        pair: the pair on the whole batch, inside ``pair.evaluating()``.
        num_samples: the number of draws for each data point.
        weigh: computes a block; by default :func:`log_weights`. It returns these weights, or a tuple that
            begins with them and holds more tensors (samples, data, ...).
        compiled: compile the weights of a block.
        side_by_side: the most draws of a data point in one block.

    Yields:
        The data of the block, and their log weights in nats, (samples, data). Take all blocks: after the last
        one follows the check that the weights are numbers.

    Raises:
        ValueError: as :func:`~pyro_vae.log_evidence`.
    """
    # Make as few runs of equal size as possible; drop surplus samples of the last run.
    at_once = math.ceil(num_samples / math.ceil(num_samples / (side_by_side or SAMPLES)))
    graphs: dict[int, Callable[[Pair], Any]] = {}
    layouts: dict[int, PlateLayout] = {}

    def layout_of(chunk: Pair) -> PlateLayout:
        size = len(chunk.args[0])
        if size not in layouts:
            with chunk.isolated(validate=False):
                layouts[size] = find_layout(chunk, particles=True)
        return layouts[size]

    rows = rows_at_once(pair)
    checked_chunks(pair, rows)
    head = next(chunks(pair, rows // at_once))
    # Fewer samples where the data cannot be split, and more data where samples are drawn one by one.
    at_once = min(at_once, max(1, rows // len(head.args[0])))
    if layout_of(head).particle_dim is None:
        at_once = 1
    with head.trial(), head.isolated(validate=False):
        check_no_points(head.trace())

    def blocks(chunk: Pair) -> Iterator[Any]:
        size, layout = len(chunk.args[0]), layout_of(chunk)
        step = at_once if layout.particle_dim else 1
        before = chunk.snapshot()
        run = graphs.get(size) or functools.partial(weigh or log_weights, layout=layout, particles=step)
        if compiled and not graphs:
            from pyro_vae.compiled import CapturedGraph  # slow to import

            run = graphs[size] = CapturedGraph(run, chunk).compile()
        # A weight may be 0. It is an error if all of them are 0, or if one is not a number.
        largest = None
        for done in range(0, num_samples, step):
            block = map_leaves(operator.itemgetter(slice(num_samples - done)), run(chunk))
            bar.update(size * min(step, num_samples - done))
            of_block = leaves(block)[0].amax(0)
            largest = of_block if largest is None else torch.maximum(largest, of_block)
            yield block
        if largest is None or not largest.isfinite().all():
            before.restore()
            raise ValueError(locate(chunk, "The evidence is not finite"))

    start, total = 0, len(pair.args[0]) * num_samples
    with progress_bar(total=total, desc="importance samples", unit_scale=True, delay=2) as bar:
        for chunk in chunks(pair, max(rows // at_once, len(head.args[0]))):
            stop = start + len(chunk.args[0])
            yield slice(start, stop), blocks(chunk)
            start = stop


def log_mean(first: Tensor, second: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the log of the mean of weights, and its standard error by the delta method; NaN of one weight.

    Args:
        first: log sum w.
        second: log sum w^2.
        count: the number of weights in the sums, K.
    """
    # Var(mean w) / mean(w)^2 = (K sum w^2 / (sum w)^2 - 1) / (K - 1)
    log_k = math.log(count)
    spread = torch.expm1((log_k + second - 2 * first).clamp(min=0))
    error = (spread / (count - 1)).sqrt() if count > 1 else spread * math.nan
    return first - log_k, error


def log_densities(traces: Traces, layout: PlateLayout) -> tuple[Tensor, Tensor]:
    """Return log p(x, z) and log q(z | x) in nats, each (particles, N); 1 where particles have no plate."""
    p = log_prob(traces.model, density_sites(traces.model), layout)
    q = log_prob(traces.guide, latent_sites(traces.guide), layout)
    return p, q


def log_prob(trace: poutine.Trace, names: Iterable[str], layout: PlateLayout) -> Tensor:
    """Sum the unscaled, masked log probabilities of sites: (particles, N), as in :func:`log_densities`."""
    return per_data_point(trace, dict.fromkeys(names, 1.0), layout.data, layout.particle_dim)


def log_weights(pair: Pair, layout: PlateLayout, particles: int) -> Tensor:
    """Return log p(x, z) - log q(z | x) with z ~ q(z | x): (particles, N)."""
    with pair.isolated(validate=False):
        traces = layout.with_enumeration(layout.with_particles(pair, particles)).trace()
    p, q = log_densities(traces, layout)
    return p - q
