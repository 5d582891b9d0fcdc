"""The pictures show their input at the right place, and refuse input that they cannot show."""

import io
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from matplotlib import pyplot
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from torch import Tensor

from pyro_vae import plots


class Epoch(NamedTuple):
    epoch: int
    loss: float
    elbo: float
    reconstruction: float
    kl: float


def records(n: int) -> list[Epoch]:
    return [Epoch(k, 100 + 1 / k, -(99 + 2 / k), -80 - 1 / k, 19 + 1 / k) for k in range(1, n + 1)]


def uniform(*size: int) -> Tensor:
    return torch.rand(*size, generator=torch.Generator().manual_seed(0))


def shown(figure: Figure) -> Tensor:
    """The array behind the picture."""
    return torch.tensor(figure.axes[0].images[0].get_array().data)


def scattered(figure: Figure) -> Tensor:
    """The points of the scatter, (N, 2)."""
    return torch.tensor(figure.axes[0].collections[0].get_offsets().data)


# Mosaics


def test_images_places_every_pixel() -> None:
    x = uniform(5, 2 * 3)
    picture = shown(plots.images(x, (2, 3), columns=2))
    expected = torch.ones(3 * 2 + 2, 2 * 3 + 1)  # gaps and the missing sixth image are white
    for k in range(5):
        row, column = 3 * (k // 2), 4 * (k % 2)
        expected[row : row + 2, column : column + 3] = x[k].view(2, 3)
    assert torch.equal(picture, expected)


def test_images_in_colour_puts_channels_last() -> None:
    x = uniform(3, 3 * 2 * 2)
    picture = shown(plots.images(x, (3, 2, 2), columns=3))
    assert picture.shape == (2, 8, 3)
    assert torch.equal(picture[:, 3:5], x[1].view(3, 2, 2).permute(1, 2, 0))


def test_one_channel_is_grey_and_few_images_make_a_short_row() -> None:
    x = uniform(2, 4)
    assert torch.equal(shown(plots.images(x, (1, 2, 2))), shown(plots.images(x, (2, 2))))
    assert shown(plots.images(x, (2, 2), columns=10)).shape == (2, 5)


def test_grey_is_the_same_grey_in_every_picture() -> None:
    figure = plots.images(torch.full((1, 4), 0.5), (2, 2))
    image = figure.axes[0].images[0]
    assert image.get_clim() == (0, 1)
    assert image.get_cmap().name == "gray"
    assert shown(plots.images(torch.tensor([[-1.0, 0.25, 0.75, 2.0]]), (2, 2))).tolist() == [
        [0, 0.25],
        [0.75, 1],
    ]


@pytest.mark.parametrize("n", [1, 10, 57])
def test_a_pixel_is_a_whole_number_of_dots(n: int) -> None:
    figure = plots.images(uniform(n, 784), title="a title " * 10)
    height, width = shown(figure).shape
    box = figure.axes[0].get_window_extent()
    assert box.width / width == pytest.approx(round(box.width / width))
    assert box.height / height == pytest.approx(round(box.width / width))


def test_a_title_stays_inside_its_figure() -> None:
    figure = plots.images(uniform(1, 784), title="one image under a rather long title, wrapped")
    title = figure.axes[0].title
    box = title.get_window_extent(FigureCanvasAgg(figure).get_renderer())
    assert "\n" in title.get_text()
    assert figure.bbox.x0 <= box.x0 <= box.x1 <= figure.bbox.x1
    assert box.y1 <= figure.bbox.y1


def test_reconstructions_stand_below_their_images() -> None:
    x, x_hat = uniform(5, 2 * 3), uniform(5, 2 * 3) / 2
    figure = plots.reconstructions(x, x_hat, (2, 3), columns=3)
    picture, axes = shown(figure), figure.axes[0]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["x", "E[x | z]"] * 2
    middles = axes.get_yticks()
    for k in range(5):
        column = (3 + 4) * (k % 3)
        for source, middle in zip((x, x_hat), middles[2 * (k // 3) :], strict=False):
            row = int(middle - 0.5)  # the tick is halfway down the tile's two pixels
            tile = picture[row : row + 2, column : column + 3]
            assert torch.equal(tile, source[k].view(2, 3))


# The latent grid and its picture


@pytest.mark.parametrize("side", [2, 5, 20])
def test_latent_grid_is_symmetric_and_upright(side: int) -> None:
    z = plots.latent_grid(side)
    assert z.shape == (side * side, 2)
    assert z.dtype == torch.get_default_dtype()
    grid = z.view(side, side, 2)
    assert torch.allclose(grid, -grid.flip(0, 1), atol=1e-6)
    assert (grid[:, 1:, 0] > grid[:, :-1, 0]).all()  # z_1 rises to the right
    assert (grid[1:, :, 1] < grid[:-1, :, 1]).all()  # z_2 falls down the page
    assert torch.equal(grid[0, :, 0], grid[-1, :, 0])
    assert torch.equal(grid[:, 0, 1], grid[:, -1, 1])


def test_latent_grid_is_even_in_probability() -> None:
    row = plots.latent_grid(7).view(7, 7, 2)[0, :, 0]
    assert torch.allclose(torch.special.ndtr(row), torch.linspace(0.02, 0.98, 7), atol=1e-6)


def test_manifold_ticks_are_the_z_of_the_tiles() -> None:
    side, (height, width) = 20, (4, 6)
    z = plots.latent_grid(side)
    x = torch.special.ndtr(z[:, :1]).expand(-1, height * width)  # the grey level encodes z_1
    figure = plots.manifold(x, (height, width))
    axes, picture = figure.axes[0], shown(figure)
    assert picture.shape == (side * height, side * width)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("$z_1$", "$z_2$")
    for tick, label in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True):
        value = float(label.get_text().replace("\N{MINUS SIGN}", "-"))
        at = (tick - (width - 1) / 2) / width  # in tiles
        left, right = picture[0, width * math.floor(at)], picture[0, width * math.ceil(at)]
        grey = left + (right - left) * (at % 1)
        assert torch.special.ndtri(grey) == pytest.approx(value, abs=1e-3)
    heights = dict(zip([t.get_text() for t in axes.get_yticklabels()], axes.get_yticks(), strict=1))
    assert heights["2"] < heights["0"] < heights["\N{MINUS SIGN}2"]  # row 0 is the top
    assert heights["0"] == pytest.approx((side * height - 1) / 2, abs=1e-4)


# Latent planes


def test_two_dimensions_are_drawn_as_they_are() -> None:
    z = uniform(7, 2)
    figure = plots.latent_plane(z)
    assert torch.equal(scattered(figure), z.double())
    assert figure.axes[0].get_aspect() == 1


def test_projection_recovers_a_plane() -> None:
    plane = torch.randn(50, 2, generator=torch.Generator().manual_seed(1)).double()
    plane -= plane.mean(0)
    u, _, _ = torch.linalg.svd(plane, full_matrices=False)
    plane = u * torch.tensor([6.0, 2.0])  # uncorrelated, variances 9 to 1
    basis, _ = torch.linalg.qr(uniform(5, 2).double())
    figure = plots.latent_plane(plane @ basis.T + 3)
    signs = basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()
    assert torch.allclose(scattered(figure), plane * signs)
    assert figure.axes[0].get_xlabel() == "component 1 (90% of the variance)"
    assert figure.axes[0].get_ylabel() == "component 2 (10% of the variance)"


def test_projection_is_deterministic_and_ignores_the_order_of_data() -> None:
    z = uniform(40, 6) * torch.arange(1, 7)
    first, again = (scattered(plots.latent_plane(z)) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.allclose(scattered(plots.latent_plane(z.flip(0))), first.flip(0))


def test_one_dimension_is_spread_in_the_same_way_every_time() -> None:
    z = uniform(100, 1)
    points = scattered(plots.latent_plane(z))
    assert torch.equal(points[:, :1], z.double())
    assert torch.equal(points, scattered(plots.latent_plane(z)))
    assert (points[:, 1].sort().values - torch.linspace(0, 1, 100)).abs().max() < 0.03


def test_a_label_keeps_its_colour_and_its_name() -> None:
    labels = torch.tensor([7, 2, 7, 2])
    figure = plots.latent_plane(uniform(4, 2), labels, [f"class {k}" for k in range(10)])
    axes = figure.axes[0]
    colours = [tuple(colour[:3]) for colour in axes.collections[0].get_facecolor()]
    assert colours == [to_rgba(f"C{k}")[:3] for k in labels.tolist()]
    legend = axes.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["class 2", "class 7"]
    assert [to_rgba(line.get_color())[:3] for line in legend.get_lines()] == [
        to_rgba("C2")[:3],
        to_rgba("C7")[:3],
    ]


@pytest.mark.parametrize("labels", [torch.arange(11), torch.linspace(0, 1, 11)])
def test_more_classes_or_reals_get_a_colour_bar(labels: Tensor) -> None:
    figure = plots.latent_plane(uniform(11, 3), labels)
    assert figure.axes[0].get_legend() is None
    assert figure.axes[1].get_ylabel() == "label"
    assert torch.equal(torch.tensor(figure.axes[0].collections[0].get_array().data), labels.double())


def test_a_colour_bar_names_its_classes() -> None:
    names = [f"class {k}" for k in range(12)]
    figure = plots.latent_plane(uniform(11, 2), torch.arange(11), names)
    assert [text.get_text() for text in figure.axes[1].get_yticklabels()] == names
    assert figure.axes[1].get_ylim() == (0, 11)  # the colours span all classes, seen or not


def test_a_collapsed_posterior_has_no_variance_to_share() -> None:
    figure = plots.latent_plane(torch.zeros(5, 4))
    assert figure.axes[0].get_xlabel() == "component 1 (0% of the variance)"


# Learning curves


@pytest.mark.parametrize("n", [1, 2, 100])
def test_learning_curves_draw_the_records(n: int) -> None:
    figure = plots.learning_curves(records(n))
    figure.canvas.draw()
    objective, reconstruction, kl = figure.axes
    loss, negative_elbo = objective.get_lines()
    assert list(loss.get_xdata()) == [e.epoch for e in records(n)]
    assert list(loss.get_ydata()) == [e.loss for e in records(n)]
    assert list(negative_elbo.get_ydata()) == [-e.elbo for e in records(n)]
    assert list(reconstruction.get_lines()[0].get_ydata()) == [e.reconstruction for e in records(n)]
    assert list(kl.get_lines()[0].get_ydata()) == [e.kl for e in records(n)]
    for axes in figure.axes:
        low, high = axes.get_xlim()
        ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
        assert ticks
        assert all(float(tick).is_integer() for tick in ticks)
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", "nats per datum")
        assert all((line.get_marker() == "o") == (n < 100) for line in axes.get_lines())


# Every figure, and every refusal

GREY = torch.full((4, 784), 0.5)
FIGURES = {
    "images": lambda: plots.images(uniform(11, 784), title="eleven"),
    "one image": lambda: plots.images(uniform(1, 1), (1, 1), title="one pixel"),
    "a thousand images": lambda: plots.images(uniform(1000, 784), columns=2),
    "colour": lambda: plots.images(uniform(4, 12), (3, 2, 2)),
    "half": lambda: plots.images(GREY.bfloat16()),
    "in a graph": lambda: plots.images(GREY.clone().requires_grad_()),
    "reconstructions": lambda: plots.reconstructions(uniform(11, 784), uniform(11, 784)),
    "manifold": lambda: plots.manifold(GREY),
    "traversals": lambda: plots.traversals(uniform(6, 784), [4, 0]),
    "interpolations": lambda: plots.interpolations(uniform(6, 12), 3, (3, 2, 2)),
    "one epoch": lambda: plots.learning_curves(records(1)),
    "many epochs": lambda: plots.learning_curves(records(100)),
    "z in a graph": lambda: plots.latent_plane(uniform(20, 2).requires_grad_()),
    "one dimension": lambda: plots.latent_plane(uniform(20, 1), torch.arange(20) % 2),
    "three dimensions": lambda: plots.latent_plane(uniform(20, 3), torch.arange(20)),
    "one point": lambda: plots.latent_plane(uniform(1, 3)),
    "collapsed": lambda: plots.latent_plane(torch.zeros(5, 4), torch.full((5,), 0.5)),
    "negative labels": lambda: plots.latent_plane(uniform(2, 2), torch.tensor([-1, 1])),
    "many classes": lambda: plots.latent_plane(
        uniform(40, 2), torch.arange(40), [f"class {k}" for k in range(60)]
    ),
}


@pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES.keys())
def test_every_figure_saves_silently(draw: Callable[[], Figure]) -> None:
    figure = draw()
    for tight in (None, "tight"):
        file = io.BytesIO()
        figure.savefig(file, bbox_inches=tight, dpi=40)
        assert file.getvalue().startswith(b"\x89PNG")
    figure.tight_layout()
    figure.savefig(io.BytesIO(), dpi=40)


def test_no_figure_stays_with_pyplot() -> None:
    before = pyplot.get_fignums()
    assert all(draw().canvas.manager is None for draw in FIGURES.values())
    assert pyplot.get_fignums() == before


Z, NAN = uniform(4, 2), math.nan
DIVERGED = records(2)[1]._replace(loss=math.inf)
REFUSALS = {
    "rank": (lambda: plots.images(GREY.view(4, 28, 28)), "x: expected shape .N, D.*flatten"),
    "no images": (lambda: plots.images(GREY[:0]), r"got \(0, 784\)"),
    "no pixels": (lambda: plots.images(GREY[:, :0]), r"got \(4, 0\)"),
    "bytes": (lambda: plots.images(GREY.byte()), "expected floats, got torch.uint8.*/ 255"),
    "nan": (lambda: plots.images(GREY * NAN), "expected finite values, got"),
    "size": (lambda: plots.images(GREY, (28, 27)), r"D = 756, got 784. To fix: change shape=\(28, 27\)"),
    "channels": (lambda: plots.images(GREY, (2, 14, 28)), r"shape: .* got \(2, 14, 28\)"),
    "no shape": (lambda: plots.images(GREY, ()), "shape: expected"),
    "negative shape": (lambda: plots.images(GREY, (-28, -28)), "shape: expected"),
    "columns": (lambda: plots.images(GREY, columns=0), "columns: expected at least 1, got 0"),
    "pairs": (lambda: plots.reconstructions(GREY, GREY[:3]), r"x_hat: .*\(4, 784\), got \(3, 7"),
    "nan pair": (lambda: plots.reconstructions(GREY, GREY * NAN), "x_hat: expected finite"),
    "side": (lambda: plots.latent_grid(1), "side: expected at least 2, got 1"),
    "no square": (lambda: plots.manifold(GREY[:3]), "side.*got 3. To fix: decode latent_grid"),
    "one tile": (lambda: plots.manifold(GREY[:1]), "side.*got 1. To fix: decode latent_grid"),
    "no point": (lambda: plots.latent_lines(Z, [0]), r"z: expected shape .D,., got \(4, 2\)"),
    "no axis": (lambda: plots.latent_lines(Z[0], []), "dimensions: expected one or more, got none"),
    "no such axis": (lambda: plots.latent_lines(Z[0], [1, 2]), r"dimensions: expected 0 to 1, got \[2\]"),
    "one step": (lambda: plots.latent_lines(Z[0], [0], steps=1), "steps: expected at least 2"),
    "ragged lines": (lambda: plots.traversals(GREY, [0, 1, 2]), "each of 3 lines, got 4"),
    "no lines": (lambda: plots.traversals(GREY, []), "each of 0 lines"),
    "no end": (lambda: plots.latent_paths(Z, Z[:3]), r"end: expected shape \(4, 2\), .*got \(3, 2\)"),
    "one step of a path": (lambda: plots.latent_paths(Z, Z, 1), "steps: expected at least 2"),
    "ragged paths": (lambda: plots.interpolations(GREY, 3), "x: expected a multiple of steps=3"),
    "z rank": (lambda: plots.latent_plane(Z[0]), r"z: expected .* got \(2,\). To fix: pass one"),
    "no z": (lambda: plots.latent_plane(Z[:0]), r"z: expected .* got \(0, 2\)"),
    "z nan": (lambda: plots.latent_plane(Z * NAN), "z: expected finite"),
    "labels": (lambda: plots.latent_plane(Z, torch.arange(3)), r"labels: .*\(4,\), got \(3,\)"),
    "one-hot": (lambda: plots.latent_plane(Z, torch.eye(4)), r"got \(4, 4\).*one-hot"),
    "nan labels": (lambda: plots.latent_plane(Z, Z[:, 0] / 0), "labels: expected finite"),
    "nameless": (lambda: plots.latent_plane(Z, torch.arange(4), ["a", "b"]), r"0 to 1, .*\[2.0, 3"),
    "unlabelled": (lambda: plots.latent_plane(Z, classes=["a"]), "labels: .*pass both"),
    "no epochs": (lambda: plots.learning_curves([]), "epochs: expected at least one"),
    "diverged": (lambda: plots.learning_curves([DIVERGED]), r"epochs: loss: .*got \[inf\]"),
    "no field": (lambda: plots.learning_curves([SimpleNamespace(epoch=1)]), "epochs: loss"),
}


@pytest.mark.parametrize(("draw", "message"), REFUSALS.values(), ids=REFUSALS.keys())
def test_refuses(draw: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw()


def test_latent_lines_and_paths() -> None:
    z = torch.tensor([1.0, 2.0, 3.0])
    lines = plots.latent_lines(z, [2, 0], steps=3, reach=2.0)
    expected = [[1, 2, -2], [1, 2, 0], [1, 2, 2], [-2, 2, 3], [0, 2, 3], [2, 2, 3]]
    assert torch.equal(lines, torch.tensor(expected, dtype=torch.float32))
    paths = plots.latent_paths(torch.stack([z, -z]), torch.stack([z + 2, 3 * z]), steps=3)
    assert torch.equal(paths[:3], torch.stack([z, z + 1, z + 2]))
    assert torch.equal(paths[3:], torch.stack([-z, z, 3 * z]))


def test_a_line_is_a_row_of_its_picture() -> None:
    x = torch.arange(6.0)[:, None] / 5
    for figure in (plots.traversals(x, [3, 7], (1, 1)), plots.interpolations(x, 3, (1, 1))):
        drawn = figure.axes[0].images[0].get_array()
        assert drawn is not None
        torch.testing.assert_close(torch.as_tensor(drawn[::2, ::2].data), x.view(2, 3))
    labels = plots.traversals(x, [3, 7], (1, 1)).axes[0].get_yticklabels()
    assert [label.get_text() for label in labels] == ["$z_{3}$", "$z_{7}$"]
