"""The pictures of a VAE: pure functions from tensors to matplotlib figures.

No function here needs a model. pyplot is not used: a figure needs no display and belongs only to its caller;
``figure.savefig(path)`` saves it. Images are rows of x ``(N, D)``, floats in [0, 1]; values outside, such as
the means of a Gaussian may have, are clipped. ``shape`` is (H, W), or (C, H, W) with C = 1 or 3, and D is its
product. Tensors may be on any device and in any graph. Every function raises ValueError for input that it
cannot draw correctly: wrong shapes, N = 0, infinite values or nan.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator
from torch import Tensor

_DPI = 150
_TAIL = 0.02  # the latent grid leaves out this probability on each side; z goes from -2.05 to 2.05


def images(x: Tensor, shape: Sequence[int] = (28, 28), columns: int = 10, title: str = "") -> Figure:
    """Draw the images x ``(N, D)``, row by row, ``columns`` per row."""
    tiles = _tiles("x", x, shape)
    return _picture(_mosaic(tiles, columns), tiles, title)[0]


def reconstructions(x: Tensor, x_hat: Tensor, shape: Sequence[int] = (28, 28), columns: int = 10) -> Figure:
    """Draw the images x ``(N, D)``, each above its reconstruction x_hat ``(N, D)``, the mean of p(x | z)."""
    _require(x.shape == x_hat.shape, "x_hat", f"shape {(*x.shape,)}", (*x_hat.shape,), "pass one per image")
    above, below = _tiles("x", x, shape), _tiles("x_hat", x_hat, shape)
    # A pair is one tall tile, so no number of columns separates an image from its reconstruction.
    pairs = torch.cat([above, torch.ones_like(above[:, :, :1]), below], dim=2)
    mosaic = _mosaic(pairs, columns, gap=4)
    figure, axes = _picture(mosaic, above, left=0.7)
    height = above.shape[2]
    tops = range(0, len(mosaic), pairs.shape[2] + 4)
    middles = [top + (height - 1) / 2 + row * (height + 1) for top in tops for row in (0, 1)]
    axes.set_yticks(middles, ["x", "E[x | z]"] * len(tops))
    axes.tick_params(length=0)
    return figure


def learning_curves(epochs: Sequence[Any]) -> Figure:
    """Draw the training loss, the negative ELBO and its two terms, in nats per data point.

    Args:
        epochs: records with the numbers ``epoch``, ``loss``, ``elbo``, ``reconstruction`` and ``kl`` as
            attributes; elbo = reconstruction - kl, reconstruction = E_q[log p(x | z)].
    """
    _require(len(epochs) > 0, "epochs", "at least one record", "none", "train first")
    fields = ("epoch", "loss", "elbo", "reconstruction", "kl")
    curves = {name: [float(getattr(e, name, math.nan)) for e in epochs] for name in fields}
    for name, curve in curves.items():
        bad = [value for value in curve if not math.isfinite(value)]
        _require(not bad, f"epochs: {name}", "finite numbers", bad[:5], "drop the epochs that diverged")
    at, loss, elbo, reconstruction, kl = curves.values()
    panels = (
        ("objective", {"training loss": loss, "negative ELBO": [-value for value in elbo]}),
        ("reconstruction, E[log p(x | z)]", {"reconstruction": reconstruction}),
        ("KL(q || p)", {"KL": kl}),
    )
    figure = Figure(figsize=(11, 3.4), dpi=_DPI, layout="tight")
    marker = "o" if len(at) <= 25 else ""  # a line through one epoch is invisible
    colours = iter(("C0", "C1", "C2", "C3"))
    for axes, (title, lines) in zip(figure.subplots(1, 3), panels, strict=True):
        for (label, curve), style in zip(lines.items(), ("-", "--"), strict=False):
            axes.plot(at, curve, style, marker=marker, ms=4, color=next(colours), label=label)
        axes.set(title=title, xlabel="epoch", ylabel="nats per datum")
        axes.set_xlim(min(at) - 0.5, max(at) + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        axes.ticklabel_format(axis="y", useOffset=False)
        _plain(axes)
    figure.axes[0].legend(frameon=False)
    return figure


def elbo_comparison(records: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw estimators of a bound side by side: the bound, its cost, and the signal in its gradient.

    The first row shows the gap to log p(x) (or the value, if a gap is missing), with two standard errors, and
    the milliseconds. One row per group follows. An infinite or missing number is written, not drawn.

    Args:
        records: ``Comparison.records``, dicts with ``estimator``, ``particles``, ``value``, ``value_error``,
            ``gap``, ``ms``, ``group``, ``snr`` and ``snr_per_root_second``.
    """
    _require(len(records) > 0, "records", "at least one", "none", "pass the records of a comparison")
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        groups.setdefault(record["group"], []).append(record)
    first = next(iter(groups.values()))
    if all(r["gap"] is not None for r in first):
        bound = ("gap", "gap of the bound to log p(x), nats a datum\n(shorter is tighter)")
    else:
        bound = ("value", "value of the bound, nats a datum\n(right is tighter)")
    rows = [[(first, *bound), (first, "ms", "milliseconds a draw\n(shorter is cheaper)")]]
    for group, members in groups.items():
        signal = f"signal / noise of the gradient, {group}:"
        per_draw = (members, "snr", f"{signal}\na draw (longer is better)")
        per_second = (members, "snr_per_root_second", f"{signal}\na second of draws (longer is better)")
        rows.append([per_draw, per_second])
    names = [f"{r['estimator']}, k = {r['particles']}" for r in first]
    places = range(len(names))
    figure = Figure(figsize=(10, len(rows) * (1.1 + 0.25 * len(names))), dpi=_DPI, layout="tight")
    grid = figure.subplots(len(rows), 2, sharey=True, squeeze=False)
    for panels, row in zip(grid, rows, strict=True):
        for axes, (members, field, title) in zip(panels, row, strict=True):
            numbers = [math.nan if r[field] is None else float(r[field]) for r in members]
            drawn = [number if math.isfinite(number) else 0.0 for number in numbers]
            errors = [2 * r["value_error"] if field in ("gap", "value") else 0.0 for r in members]
            if field == "value":  # its zero has no meaning, so a bar from zero would mislead
                axes.plot(drawn, places, "o", color="C0")
            else:
                axes.barh(places, drawn, height=0.6, color="C0", alpha=0.75)
            if any(errors):
                axes.errorbar(drawn, places, xerr=errors, fmt="none", ecolor="k", capsize=3, lw=1)
            for place, number, at, error in zip(places, numbers, drawn, errors, strict=True):
                text, end = "none" if math.isnan(number) else f"{number:.3g}", (at + error, place)
                axes.annotate(text, end, (5, 0), textcoords="offset points", va="center", size=8)
            axes.set_title(title, fontsize=10)
            axes.set_yticks(places, names)
            axes.set_ylim(len(names) - 0.5, -0.5)
            axes.margins(x=0.15)
            _plain(axes)
    return figure


def signal_over_particles(stages: Mapping[str, Sequence[Mapping[str, Any]]], floor: float = 0.0) -> Figure:
    """Draw the signal-to-noise ratio of gradients against particles: one row per group, one column per stage.

    Args:
        stages: title -> ``Comparison.records`` of estimators at several numbers of particles, dicts with
            ``estimator``, ``particles``, ``group`` and ``snr``; one line per ``estimator``.
        floor: ``Comparison.snr_floor``, drawn as a line.
    """
    sizes = {title: len(records) for title, records in stages.items()}
    _require(bool(sizes) and all(sizes.values()), "stages", "records in each", sizes, "compare first")
    every = [record for records in stages.values() for record in records]
    groups = list(dict.fromkeys(r["group"] for r in every))
    names = list(dict.fromkeys(r["estimator"] for r in every))
    particles = sorted({r["particles"] for r in every})
    width, height = 1.2 + 2.9 * len(stages), 0.6 + 2.7 * len(groups)
    figure = Figure(figsize=(max(width, 7.5), height), dpi=_DPI, layout="constrained")
    grid = figure.subplots(len(groups), len(stages), sharex=True, sharey="row", squeeze=False)
    for panels, group in zip(grid, groups, strict=True):
        for axes, (title, records) in zip(panels, stages.items(), strict=True):
            for name in names:
                line = [r for r in records if (r["estimator"], r["group"]) == (name, group)]
                line = sorted((r for r in line if r["snr"] is not None), key=lambda r: r["particles"])
                at = [r["particles"] for r in line], [r["snr"] for r in line]
                # Estimators may agree to the last bit: with open markers and thin lines both are visible.
                axes.plot(*at, "-", marker="osD^v"[names.index(name) % 5], mfc="none", ms=7, label=name)
            if floor:
                axes.axhline(floor, color="k", ls=":", label="shown by noise alone")
            axes.set(xscale="log", yscale="log", title=f"{group} gradient: {title}")
            axes.title.set_fontsize(10)
            axes.set_xticks(particles, particles)
            axes.set_xticks([], minor=True)
            axes.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}")
            axes.set_yticks([], minor=True)
            _plain(axes)
        panels[0].set_ylabel("signal / noise of a draw\n(higher is better)")
    for axes in grid[-1]:
        axes.set_xlabel("particles")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=6, frameon=False)
    return figure


def latent_plane(z: Tensor, labels: Tensor | None = None, classes: Sequence[str] | None = None) -> Figure:
    """Draw posterior means z ``(N, d)`` in the plane, coloured by label.

    One dimension is spread over a second axis without meaning. Two dimensions are drawn as they are. More are
    projected onto the first two principal components; the sign of each makes its largest loading positive.

    Args:
        z: posterior means ``(N, d)``.
        labels: numbers ``(N,)``. Up to 10 classes have a legend; more classes, or reals, have a colour bar.
        classes: names; ``classes[k]`` is the name of label k.
    """
    z = _matrix("z", z, "pass one posterior mean per row").double()
    y = None if labels is None else _labels(labels, len(z), classes)
    _require(y is not None or classes is None, "labels", "numbers beside classes", None, "pass both")
    figure = Figure(figsize=(6.4, 5.4), dpi=_DPI, layout="tight")
    axes = figure.subplots()
    if z.shape[1] == 1:
        # Multiples of the golden ratio spread any number of points evenly, in the same way every time.
        z = torch.cat([z, (torch.arange(len(z))[:, None] * ((5**0.5 - 1) / 2)) % 1], dim=1)
        axes.set(xlabel="$z$", ylabel="spread, without meaning", yticks=[])
    else:
        names = ["$z_1$", "$z_2$"]
        if z.shape[1] > 2:
            z, shares = _principal(z)
            names = [f"component {k} ({s:.0%} of the variance)" for k, s in enumerate(shares, 1)]
        axes.set(xlabel=names[0], ylabel=names[1])
        axes.set_aspect("equal", adjustable="datalim")  # the eye reads distances in z
    # One scatter for all classes: with one per class, the last class would hide the others.
    across, up = z.T.numpy()
    points = axes.scatter(across, up, s=max(4, min(30, 2e4 / len(z))), lw=0, alpha=0.7)
    points.set_rasterized(True)
    axes.set_title("posterior means")
    _plain(axes)
    if y is None:
        return figure
    kinds = sorted(set(y.tolist()))
    if len(kinds) <= 10 and all(k.is_integer() for k in kinds):
        # A label below 10 has its own colour, whichever other labels are present.
        digits = kinds[0] >= 0 and kinds[-1] < 10
        tab10 = matplotlib.colormaps["tab10"]
        colour = {k: tab10(int(k) if digits else i) for i, k in enumerate(kinds)}
        points.set_facecolor([colour[k] for k in y.tolist()])
        for k in kinds:
            name = f"{k:g}" if classes is None else classes[int(k)]
            axes.add_line(Line2D([], [], ls="", marker="o", color=colour[k], label=name))
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
        return figure
    points.set(array=y.numpy(), cmap="viridis")
    bar = figure.colorbar(points, ax=axes, label="label")
    if classes is not None:
        points.set_clim(0, len(classes) - 1)
        named = range(0, len(classes), math.ceil(len(classes) / 25))
        bar.set_ticks(list(named), labels=[classes[k] for k in named])
    return figure


def latent_grid(side: int = 20) -> Tensor:
    """Return standard normal quantiles, evenly spaced in probability, on a square grid of side >= 2.

    Returns:
        z ``(side * side, 2)`` in picture order: row by row from the largest z_2 down, in a row z_1 rises.
    """
    _require(side >= 2, "side", "at least 2", side, "try 20")
    p = torch.linspace(_TAIL, 1 - _TAIL, side, dtype=torch.float64)
    q = torch.special.ndtri(p).to(torch.get_default_dtype())
    return torch.stack(torch.meshgrid(q, q.flip(0), indexing="xy"), dim=-1).reshape(-1, 2)


def manifold(x: Tensor, shape: Sequence[int] = (28, 28)) -> Figure:
    """Draw the means x ``(side * side, D)`` of p(x | z) for the z of ``latent_grid(side)``, in its order."""
    tiles = _tiles("x", x, shape)
    side, (height, width) = math.isqrt(len(tiles)), tiles.shape[2:]
    square = side >= 2 and side * side == len(tiles)
    _require(square, "x", "side * side images, side >= 2", len(tiles), "decode latent_grid(side)")
    figure, axes = _picture(_mosaic(tiles, side, gap=0), tiles, "E[x | z]", left=0.55, bottom=0.5)
    z = torch.arange(-2.0, 3.0)  # the tiles are evenly spaced in probability, so these ticks are not
    at = (torch.special.ndtr(z) - _TAIL) / (1 - 2 * _TAIL) * (side - 1)
    names = [f"{k:g}".replace("-", "\N{MINUS SIGN}") for k in z.tolist()]
    axes.set_xticks(((at + 0.5) * width - 0.5).tolist(), names)
    axes.set_yticks(((side - at - 0.5) * height - 0.5).tolist(), names)
    axes.set(xlabel="$z_1$", ylabel="$z_2$")
    return figure


def latent_lines(z: Tensor, dimensions: Sequence[int], steps: int = 11, reach: float = 3.0) -> Tensor:
    """Return lines through one z along its axes: dimension d runs from -reach to reach, the others stay.

    Args:
        z: the point ``(D,)``: zeros, or a posterior mean.
        dimensions: the M axes.
        steps: the number of points per line, at least 2.
        reach: the end of each line, in the unit of the latent.

    Returns:
        z ``(M * steps, D)``, line by line. ``traversals`` draws its decoded means.
    """
    _require(z.ndim == 1 and len(z) > 0, "z", "shape (D,)", (*z.shape,), "pass one point")
    _require(steps >= 2, "steps", "at least 2", steps, "try 11")
    wrong = [d for d in dimensions if not 0 <= d < len(z)]
    _require(not wrong, "dimensions", f"0 to {len(z) - 1}", wrong, "count dimensions from 0")
    _require(len(dimensions) > 0, "dimensions", "one or more", "none", "choose the active dimensions")
    lines = z.repeat(len(dimensions), steps, 1)
    values = torch.linspace(-reach, reach, steps).to(z)
    for line, d in zip(lines, dimensions, strict=True):
        line[:, d] = values
    return lines.flatten(0, 1)


def traversals(x: Tensor, dimensions: Sequence[int], shape: Sequence[int] = (28, 28)) -> Figure:
    """Draw the means x ``(M * steps, D)`` of p(x | z) on the ``latent_lines`` of M dimensions, a row each."""
    tiles, lines = _tiles("x", x, shape), len(dimensions)
    whole = lines > 0 and len(tiles) % lines == 0
    _require(whole, "x", f"equally many images for each of {lines} lines", len(x), "decode latent_lines(...)")
    figure, axes = _picture(_mosaic(tiles, len(tiles) // lines), tiles, "E[x | z]", left=0.7)
    height = tiles.shape[2]
    middles = [row * (height + 1) + (height - 1) / 2 for row in range(lines)]
    axes.set_yticks(middles, [f"$z_{{{d}}}$" for d in dimensions])
    axes.tick_params(length=0)
    return figure


def latent_paths(start: Tensor, end: Tensor, steps: int = 11) -> Tensor:
    """Return straight lines from each start ``(N, D)`` to its end ``(N, D)``.

    Returns:
        z ``(N * steps, D)``, line by line, both ends included. ``interpolations`` draws its decoded means.
    """
    size, same = (*end.shape,), start.ndim == 2 and start.shape == end.shape and 0 not in end.shape
    _require(same, "end", f"shape {(*start.shape,)}, (N, D) as start", size, "pass one end per start")
    _require(steps >= 2, "steps", "at least 2", steps, "try 11")
    share = torch.linspace(0, 1, steps).to(start)[:, None]
    return torch.lerp(start[:, None], end[:, None], share).flatten(0, 1)


def interpolations(x: Tensor, steps: int = 11, shape: Sequence[int] = (28, 28)) -> Figure:
    """Draw the means x ``(N * steps, D)`` of p(x | z) on N ``latent_paths``, one row each, start to end."""
    tiles = _tiles("x", x, shape)
    whole = steps >= 2 and len(tiles) % steps == 0
    _require(whole, "x", f"a multiple of steps={steps} >= 2 images", len(x), "decode latent_paths(...)")
    return _picture(_mosaic(tiles, steps), tiles, "E[x | z] from one z to another")[0]


def _require(condition: bool, subject: str, expected: object, got: object, to_fix: str) -> None:
    if not condition:
        raise ValueError(f"{subject}: expected {expected}, got {got}. To fix: {to_fix}.")


def _matrix(name: str, x: Tensor, to_fix: str) -> Tensor:
    """Return finite x ``(N, D)`` as float32 or float64, on the CPU and outside any graph."""
    filled = x.ndim == 2 and x.numel() > 0
    _require(filled, name, "shape (N, D), N and D at least 1", (*x.shape,), to_fix)
    _require(x.is_floating_point(), name, "floats", x.dtype, "call .float(), and / 255 for bytes")
    _require(bool(x.isfinite().all()), name, "finite values", "infinity or nan", "look for diverged training")
    return x.detach().cpu().to(torch.promote_types(x.dtype, torch.float32))


def _labels(labels: Tensor, n: int, classes: Sequence[str] | None) -> Tensor:
    y, size = labels.detach().cpu().double(), (*labels.shape,)
    _require(size == (n,), "labels", f"shape {(n,)}", size, "pass one number per row of z, not one-hot rows")
    _require(bool(y.isfinite().all()), "labels", "finite numbers", "infinity or nan", "drop those rows")
    if classes is not None:
        extra = sorted(set(y.tolist()) - set(range(len(classes))))
        _require(not extra, "labels", f"0 to {len(classes) - 1}", extra[:5], "name every class")
    return y


def _tiles(name: str, x: Tensor, shape: Sequence[int]) -> Tensor:
    """Return images ``(N, D)`` as tiles ``(N, C, H, W)`` in [0, 1]."""
    channels = {2: 1, 3: shape[0]}.get(len(shape)) if shape else None
    valid = channels in (1, 3) and min(shape) >= 1
    _require(valid, "shape", "(H, W) or (C, H, W), C 1 or 3", shape, "put channels first")
    x, size = _matrix(name, x, "flatten images, x.flatten(1)"), math.prod(shape)
    _require(x.shape[1] == size, name, f"D = {size}", x.shape[1], f"change shape={(*shape,)}")
    return x.clamp(0, 1).reshape(len(x), -1, *shape[-2:])


def _mosaic(tiles: Tensor, columns: int, gap: int = 1) -> Tensor:
    """Put tiles ``(N, C, H, W)`` into one picture ``(height, width)`` or, in colour, ``(..., 3)``."""
    _require(columns >= 1, "columns", "at least 1", columns, "try 10")
    n, c, h, w = tiles.shape
    columns = min(columns, n)
    rows = math.ceil(n / columns)
    # White like the page: gaps appear as lines, and empty places in the last row are invisible.
    page = tiles.new_ones(rows * columns, c, h + gap, w + gap)
    page[:n, :, :h, :w] = tiles
    page = page.reshape(rows, columns, c, h + gap, w + gap).permute(0, 3, 1, 4, 2)
    page = page.reshape(rows * (h + gap), columns * (w + gap), c)
    return page[: len(page) - gap, : page.shape[1] - gap].squeeze(2)


def _picture(
    mosaic: Tensor, tiles: Tensor, title: str = "", left: float = 0.1, bottom: float = 0.1
) -> tuple[Figure, Axes]:
    """Return a figure of the mosaic. A pixel is a whole number of dots, so all gaps have the same width."""
    zoom = min(225 / max(tiles.shape[2:]), 1200 / max(mosaic.shape[:2]))
    zoom = (math.floor(zoom) if zoom > 1 else zoom) / _DPI  # inches per pixel
    height, width = (zoom * length for length in mosaic.shape[:2])
    wide = max(left + width + 0.1, 2.5)
    title = textwrap.fill(title, int(wide * 11))
    high = bottom + height + 0.1 + (0.2 * (title.count("\n") + 1) if title else 0)
    start = left + (wide - left - 0.1 - width) / 2
    figure = Figure(figsize=(wide, high), dpi=_DPI)
    axes = figure.subplots()
    figure.subplots_adjust(start / wide, bottom / high, (start + width) / wide, (bottom + height) / high)
    axes.imshow(mosaic.numpy(), cmap="gray", vmin=0, vmax=1)
    axes.set_title(title, fontsize=11, pad=4)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    return figure, axes


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)


def _principal(z: Tensor) -> tuple[Tensor, list[float]]:
    """Return scores ``(N, 2)`` of z ``(N, d > 2)`` on its principal axes, and their shares of variance."""
    z = z - z.mean(0)
    # A row of zeros changes no singular value, and with it even a single point has two components.
    _, s, v = torch.linalg.svd(torch.cat([z, torch.zeros_like(z[:1])]), full_matrices=False)
    v = v[:2] * v[:2].gather(1, v[:2].abs().argmax(1, keepdim=True)).sign()
    shares = s[:2].square() / s.square().sum().clamp(min=1e-300)  # 0, not 0 / 0, if all z are equal
    return z @ v.T, shares.tolist()
