"""Mosaics: images side by side.

Images are rows of x ``(N, D)``, floats in [0, 1]. Other values, such as some means of a Gaussian, are
clipped. ``shape`` is (H, W), or (C, H, W) with C = 1 or 3, and D is its product.
Tensors may be on any device and in any graph. Every function raises ValueError for input that it cannot draw
correctly.
"""

import math
import textwrap
from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from pyro_vae.arguments import given, is_whole, require
from pyro_vae.plots.checks import DOTS, check_count, check_dimensions, is_list, matrix
from pyro_vae.plots.figure import DPI, NotebookFigure
from pyro_vae.plots.latents import TAIL

_IMAGE_DOTS = 225  # the most dots along the longer side of an image


def images(x: Tensor, *, shape: Sequence[int] = (28, 28), columns: int = 10, title: str = "") -> Figure:
    """Draw the images x ``(N, D)``, row by row, ``columns`` per row, under a title without formulas."""
    to_fix = "leave it out, or pass a string"
    require(isinstance(title, str), "title", "a string", given(title), to_fix)
    tiles = _tiles("x", x, shape)
    return _picture(_mosaic(tiles, columns), tiles, title)[0]


def reconstructions(
    x: Tensor, x_hat: Tensor, *, shape: Sequence[int] = (28, 28), columns: int = 10
) -> Figure:
    """Draw the images x ``(N, D)``, each above its reconstruction x_hat ``(N, D)``, the mean of p(x | z)."""
    above, below = _tiles("x", x, shape), _tiles("x_hat", x_hat, shape)
    require(len(above) == len(below), "x_hat", f"{len(above)} images", len(below), "pass one for each image")
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


def manifold(x: Tensor, *, shape: Sequence[int] = (28, 28)) -> Figure:
    """Draw the means x ``(side * side, D)`` of p(x | z) for the z of a ``latent_grid``, in its order."""
    tiles = _tiles("x", x, shape)
    side, (height, width) = math.isqrt(len(tiles)), tiles.shape[2:]
    square = side >= 2 and side * side == len(tiles)
    require(square, "x", "side * side images, side >= 2", len(tiles), "decode latent_grid(side=20)")
    figure, axes = _picture(_mosaic(tiles, side, gap=0), tiles, "E[x | z]", left=0.55, bottom=0.5)
    z = torch.arange(-2.0, 3.0)  # the tiles are evenly spaced in probability, so these ticks are not
    at = (torch.special.ndtr(z) - TAIL) / (1 - 2 * TAIL) * (side - 1)
    names = [f"{k:g}".replace("-", "\N{MINUS SIGN}") for k in z.tolist()]
    axes.set_xticks(((at + 0.5) * width - 0.5).tolist(), names)
    axes.set_yticks(((side - at - 0.5) * height - 0.5).tolist(), names)
    axes.set(xlabel="$z_1$", ylabel="$z_2$")
    return figure


def traversals(x: Tensor, *, dimensions: Sequence[int], shape: Sequence[int] = (28, 28)) -> Figure:
    """Draw the means x ``(M * steps, D)`` of p(x | z) on the ``latent_lines`` of M dimensions, a row each."""
    check_dimensions(dimensions)
    tiles, lines = _tiles("x", x, shape), len(dimensions)
    whole = len(tiles) % lines == 0
    require(whole, "x", f"equally many images for each of {lines} lines", len(x), "decode latent_lines(...)")
    figure, axes = _picture(_mosaic(tiles, len(tiles) // lines), tiles, "E[x | z]", left=0.7)
    height = tiles.shape[2]
    middles = [row * (height + 1) + (height - 1) / 2 for row in range(lines)]
    axes.set_yticks(middles, [f"$z_{{{d}}}$" for d in dimensions])
    axes.tick_params(length=0)
    return figure


def interpolations(x: Tensor, *, shape: Sequence[int] = (28, 28), steps: int = 11) -> Figure:
    """Draw the means x ``(N * steps, D)`` of p(x | z) on N ``latent_paths``, one row each, start to end."""
    check_count("steps", steps, 2, "pass the steps of latent_paths")
    tiles = _tiles("x", x, shape)
    whole = len(tiles) % steps == 0
    require(whole, "x", f"a multiple of steps={steps} images", len(x), "decode latent_paths(...)")
    return _picture(_mosaic(tiles, steps), tiles, "E[x | z] from one z to another")[0]


def _tiles(name: str, x: Tensor, shape: Sequence[int]) -> Tensor:
    """Return images ``(N, D)`` as tiles ``(N, C, H, W)`` in [0, 1]."""
    valid = is_list(shape) and all(is_whole(length, 1) for length in shape)
    valid = valid and (len(shape) == 2 or (len(shape) == 3 and shape[0] in (1, 3)))
    expected = "(H, W) or (C, H, W), whole numbers, C 1 or 3"
    require(valid, "shape", expected, given(shape), "put channels first, as in shape=(3, 32, 32)")
    x, size = matrix(name, x, "flatten images, x.flatten(1)"), math.prod(shape)
    to_fix = "pass the shape of your images, (H, W) or (C, H, W)"
    require(x.shape[1] == size, name, f"D = {size}, for shape={(*shape,)}", x.shape[1], to_fix)
    return x.clamp(0, 1).reshape(len(x), -1, *shape[-2:])


def _mosaic(tiles: Tensor, columns: int, gap: int = 1) -> Tensor:
    """Put tiles ``(N, C, H, W)`` into one picture ``(height, width)`` or, in colour, ``(..., 3)``."""
    require(is_whole(columns, 1), "columns", "a whole number of at least 1", given(columns), "try 10")
    n, c, h, w = tiles.shape
    columns = min(columns, n)
    rows = math.ceil(n / columns)
    zoom = min(_IMAGE_DOTS / max(h, w), DOTS / max(rows * (h + gap), columns * (w + gap)))
    expected = f"images that have a dot in a picture of {DOTS} dots"
    to_fix = "draw fewer images, x[:100], or change their shape or the number in a row"
    require(zoom * min(h, w) >= 1, "x", expected, f"{n} of {h} by {w} pixels, {columns} in a row", to_fix)
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
    zoom = min(_IMAGE_DOTS / max(tiles.shape[2:]), DOTS / max(mosaic.shape[:2]))
    zoom = (math.floor(zoom) if zoom > 1 else zoom) / DPI  # inches per pixel
    height, width = (zoom * length for length in mosaic.shape[:2])
    wide = max(left + width + 0.1, 2.5)
    title = textwrap.fill(title, int(wide * 11))
    high = bottom + height + 0.1 + (0.2 * (title.count("\n") + 1) if title else 0)
    start = left + (wide - left - 0.1 - width) / 2
    figure = NotebookFigure(figsize=(wide, high), dpi=DPI)
    axes = figure.subplots()
    figure.subplots_adjust(start / wide, bottom / high, (start + width) / wide, (bottom + height) / high)
    axes.imshow(mosaic.numpy(), cmap="gray", vmin=0, vmax=1)
    axes.set_title(title, fontsize=11, pad=4, parse_math=False)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    return figure, axes
