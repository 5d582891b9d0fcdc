"""The latent space: posterior means in the plane, and grids, lines and paths of z to be decoded.

Tensors may be on any device and in any graph; what is returned stays there. Every function raises ValueError
for input that it cannot draw correctly.
"""

import math
from collections.abc import Sequence

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from pyro_vae.arguments import check_tensor, given, require
from pyro_vae.plots.checks import (
    LARGEST,
    check_count,
    check_dimensions,
    check_floats,
    is_list,
    is_real,
    matrix,
)
from pyro_vae.plots.figure import DPI, NotebookFigure, legend, plain

TAIL = 0.02  # the latent grid leaves out this probability on each side; z goes from -2.05 to 2.05


def latent_plane(z: Tensor, labels: Tensor | None = None, *, classes: Sequence[str] | None = None) -> Figure:
    """Draw posterior means z ``(N, d)`` in the plane, coloured by label.

    One dimension is spread over a second axis without meaning. Two dimensions are drawn as they are. More are
    projected onto the first two principal components; the sign of each makes its largest loading positive.

    Args:
        z: posterior means ``(N, d)``.
        labels: numbers ``(N,)``. Up to 10 classes have a legend; more classes, or reals, have a colour bar.
        classes: names without formulas; ``classes[k]`` is the name of label k.
    """
    z = matrix("z", z, "pass one posterior mean per row").double()
    largest = float(z.abs().max())
    require(is_real(largest), "z", f"values of at most {LARGEST:g}", largest, "look for diverged training")
    y = None if labels is None else _labels(labels, len(z), classes)
    require(y is not None or classes is None, "labels", "numbers beside classes", None, "pass both")
    figure = NotebookFigure(figsize=(6.4, 5.4), dpi=DPI, layout="tight")
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
    plain(axes)
    if y is None:
        return figure
    kinds = sorted(set(y.tolist()))
    if len(kinds) <= 10 and all(k.is_integer() for k in kinds):
        # A label below 10 has its own colour, whichever other labels are present.
        digits = kinds[0] >= 0 and kinds[-1] < 10
        tab10 = matplotlib.colormaps["tab10"]
        colour = {k: tab10(int(k) if digits else i) for i, k in enumerate(kinds)}
        points.set_facecolor([colour[k] for k in y.tolist()])
        dots = [Line2D([], [], ls="", marker="o", color=colour[k]) for k in kinds]
        names = [f"{k:g}" if classes is None else classes[int(k)] for k in kinds]
        legend(axes, dots, names, loc="center left", bbox_to_anchor=(1, 0.5))
        return figure
    points.set(array=y.numpy(), cmap="viridis")
    bar = figure.colorbar(points, ax=axes, label="label")
    if classes is not None:
        points.set_clim(0, len(classes) - 1)
        named = range(0, len(classes), math.ceil(len(classes) / 25))
        bar.set_ticks(list(named), labels=[classes[k] for k in named], parse_math=False)
    return figure


def latent_grid(*, side: int = 20) -> Tensor:
    """Return standard normal quantiles, evenly spaced in probability, on a square grid of side >= 2.

    Returns:
        z ``(side * side, 2)`` in picture order: row by row from the largest z_2 down, in a row z_1 rises.
    """
    check_count("side", side, 2, "try 20")
    p = torch.linspace(TAIL, 1 - TAIL, side, dtype=torch.float64)
    q = torch.special.ndtri(p).to(torch.get_default_dtype())
    return torch.stack(torch.meshgrid(q, q.flip(0), indexing="xy"), dim=-1).reshape(-1, 2)


def latent_lines(z: Tensor, *, dimensions: Sequence[int], steps: int = 11, reach: float = 3.0) -> Tensor:
    """Return lines through one z along its axes: dimension d runs from -reach to reach, the others stay.

    Args:
        z: the point ``(D,)``: zeros, or a posterior mean.
        dimensions: the M axes.
        steps: the number of points per line, at least 2.
        reach: the end of each line, positive, in the unit of the latent.

    Returns:
        z ``(M * steps, D)``, line by line. ``traversals`` draws its decoded means.
    """
    check_floats("z", z)
    require(z.ndim == 1 and len(z) > 0, "z", "shape (D,)", (*z.shape,), "pass one point")
    check_count("steps", steps, 2, "try 11")
    check_dimensions(dimensions)
    within = is_real(reach) and 0 < reach <= torch.finfo(z.dtype).max
    require(within, "reach", f"a positive number of {z.dtype}", given(reach), "try 3.0")
    wrong = [d for d in dimensions if not 0 <= d < len(z)]
    require(not wrong, "dimensions", f"0 to {len(z) - 1}", wrong, "count dimensions from 0")
    lines = z.repeat(len(dimensions), steps, 1)
    values = torch.linspace(-float(reach), float(reach), steps, dtype=torch.float64).to(z)
    for line, d in enumerate(dimensions):
        lines[line, :, d] = values
    return lines.flatten(0, 1)


def latent_paths(start: Tensor, end: Tensor, *, steps: int = 11) -> Tensor:
    """Return straight lines from each start ``(N, D)`` to its end ``(N, D)``.

    Returns:
        z ``(N * steps, D)``, line by line, both ends included. ``interpolations`` draws its decoded means.
    """
    for name, z in (("start", start), ("end", end)):
        check_floats(name, z)
    kinds = [f"{z.dtype} on {z.device}" for z in (start, end)]
    require(kinds[0] == kinds[1], "end", f"{kinds[0]} as start", kinds[1], "end.to(start)")
    size, same = (*end.shape,), start.ndim == 2 and start.shape == end.shape and 0 not in end.shape
    require(same, "end", f"shape {(*start.shape,)}, (N, D) as start", size, "pass one end per start")
    check_count("steps", steps, 2, "try 11")
    share = torch.linspace(0, 1, steps).to(start)[:, None]
    return torch.lerp(start[:, None], end[:, None], share).flatten(0, 1)


def _labels(labels: Tensor, n: int, classes: Sequence[str] | None) -> Tensor:
    check_tensor("labels", labels)
    y, size = labels.detach().cpu().double(), (*labels.shape,)
    require(size == (n,), "labels", f"shape {(n,)}", size, "pass one number per row of z, not one-hot rows")
    drawn = bool((y.abs() <= LARGEST).all())
    require(drawn, "labels", f"finite numbers of at most {LARGEST:g}", "others", "drop those rows")
    if classes is not None:
        named = is_list(classes) and len(classes) > 0 and all(isinstance(name, str) for name in classes)
        require(named, "classes", "one string for each label", given(classes), "classes=['a', 'b']")
        extra = sorted(set(y.tolist()) - set(range(len(classes))))
        require(not extra, "labels", f"0 to {len(classes) - 1}", extra[:5], "name every class")
    return y


def _principal(z: Tensor) -> tuple[Tensor, list[float]]:
    """Return scores ``(N, 2)`` of z ``(N, d > 2)`` on its principal axes, and their shares of variance."""
    z = z - z.mean(0)
    # A row of zeros changes no singular value, and with it even a single point has two components.
    _, s, v = torch.linalg.svd(torch.cat([z, torch.zeros_like(z[:1])]), full_matrices=False)
    v = v[:2] * v[:2].gather(1, v[:2].abs().argmax(1, keepdim=True)).sign()
    shares = s[:2].square() / s.square().sum().clamp(min=1e-300)  # 0, not 0 / 0, if all z are equal
    return z @ v.T, shares.tolist()
