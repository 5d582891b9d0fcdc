"""The pictures show their input at the right place, and refuse input that they cannot show."""

import inspect
import io
import math
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from matplotlib import pyplot
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from torch import Tensor
from torch.distributions import Normal

from pyro_vae import plots
from pyro_vae.plots.figure import NotebookFigure


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
    picture = shown(plots.images(x, shape=(2, 3), columns=2))
    expected = torch.ones(3 * 2 + 2, 2 * 3 + 1)  # gaps and the missing sixth image are white
    for k in range(5):
        row, column = 3 * (k // 2), 4 * (k % 2)
        expected[row : row + 2, column : column + 3] = x[k].view(2, 3)
    assert torch.equal(picture, expected)


def test_images_in_colour_puts_channels_last() -> None:
    x = uniform(3, 3 * 2 * 2)
    picture = shown(plots.images(x, shape=(3, 2, 2), columns=3))
    assert picture.shape == (2, 8, 3)
    assert torch.equal(picture[:, 3:5], x[1].view(3, 2, 2).permute(1, 2, 0))


def test_one_channel_is_grey_and_few_images_make_a_short_row() -> None:
    x = uniform(2, 4)
    assert torch.equal(shown(plots.images(x, shape=(1, 2, 2))), shown(plots.images(x, shape=(2, 2))))
    assert shown(plots.images(x, shape=(2, 2), columns=10)).shape == (2, 5)


def test_grey_is_the_same_grey_in_every_picture() -> None:
    figure = plots.images(torch.full((1, 4), 0.5), shape=(2, 2))
    image = figure.axes[0].images[0]
    assert image.get_clim() == (0, 1)
    assert image.get_cmap().name == "gray"
    assert shown(plots.images(torch.tensor([[-1.0, 0.25, 0.75, 2.0]]), shape=(2, 2))).tolist() == [
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
    figure = plots.reconstructions(x, x_hat, shape=(2, 3), columns=3)
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
    z = plots.latent_grid(side=side)
    assert z.shape == (side * side, 2)
    assert z.dtype == torch.get_default_dtype()
    grid = z.view(side, side, 2)
    assert torch.allclose(grid, -grid.flip(0, 1), atol=1e-6)
    assert (grid[:, 1:, 0] > grid[:, :-1, 0]).all()  # z_1 rises to the right
    assert (grid[1:, :, 1] < grid[:-1, :, 1]).all()  # z_2 falls down the page
    assert torch.equal(grid[0, :, 0], grid[-1, :, 0])
    assert torch.equal(grid[:, 0, 1], grid[:, -1, 1])


def test_latent_grid_is_even_in_probability() -> None:
    row = plots.latent_grid(side=7).view(7, 7, 2)[0, :, 0]
    assert torch.allclose(torch.special.ndtr(row), torch.linspace(0.02, 0.98, 7), atol=1e-6)


def test_manifold_ticks_are_the_z_of_the_tiles() -> None:
    side, (height, width) = 20, (4, 6)
    z = plots.latent_grid(side=side)
    x = torch.special.ndtr(z[:, :1]).expand(-1, height * width)  # the grey level encodes z_1
    figure = plots.manifold(x, shape=(height, width))
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
    figure = plots.latent_plane(uniform(4, 2), labels, classes=[f"class {k}" for k in range(10)])
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
    figure = plots.latent_plane(uniform(11, 2), torch.arange(11), classes=names)
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
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", "nats per data point")
        assert all((line.get_marker() == "o") == (n < 100) for line in axes.get_lines())


# Every figure, and every refusal

GREY = torch.full((4, 784), 0.5)
FIGURES = {
    "images": lambda: plots.images(uniform(11, 784), title="eleven"),
    "one image": lambda: plots.images(uniform(1, 1), shape=(1, 1), title="one pixel"),
    "a thousand images": lambda: plots.images(uniform(1000, 784), columns=2),
    "colour": lambda: plots.images(uniform(4, 12), shape=(3, 2, 2)),
    "half": lambda: plots.images(GREY.bfloat16()),
    "in a graph": lambda: plots.images(GREY.clone().requires_grad_()),
    "reconstructions": lambda: plots.reconstructions(uniform(11, 784), uniform(11, 784)),
    "manifold": lambda: plots.manifold(GREY),
    "traversals": lambda: plots.traversals(uniform(6, 784), dimensions=[4, 0]),
    "interpolations": lambda: plots.interpolations(uniform(6, 12), shape=(3, 2, 2), steps=3),
    "one epoch": lambda: plots.learning_curves(records(1)),
    "many epochs": lambda: plots.learning_curves(records(100)),
    "z in a graph": lambda: plots.latent_plane(uniform(20, 2).requires_grad_()),
    "one dimension": lambda: plots.latent_plane(uniform(20, 1), torch.arange(20) % 2),
    "three dimensions": lambda: plots.latent_plane(uniform(20, 3), torch.arange(20)),
    "one point": lambda: plots.latent_plane(uniform(1, 3)),
    "collapsed": lambda: plots.latent_plane(torch.zeros(5, 4), torch.full((5,), 0.5)),
    "negative labels": lambda: plots.latent_plane(uniform(2, 2), torch.tensor([-1, 1])),
    "many classes": lambda: plots.latent_plane(
        uniform(40, 2), torch.arange(40), classes=[f"class {k}" for k in range(60)]
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
    "bytes": (lambda: plots.images(GREY.byte()), r"floats, got torch.uint8. To fix: x.float\(\) / 255"),
    "nan": (lambda: plots.images(GREY * NAN), "expected finite values, got"),
    "size": (
        lambda: plots.images(GREY, shape=(28, 27)),
        r"D = 756, for shape=\(2",
    ),
    "channels": (lambda: plots.images(GREY, shape=(2, 14, 28)), r"shape: .* got \(2, 14, 28\)"),
    "no shape": (lambda: plots.images(GREY, shape=()), "shape: expected"),
    "negative shape": (lambda: plots.images(GREY, shape=(-28, -28)), "shape: expected"),
    "columns": (
        lambda: plots.images(GREY, columns=0),
        "columns: expected a whole number of at least 1, got 0",
    ),
    "pairs": (lambda: plots.reconstructions(GREY, GREY[:3]), "x_hat: expected 4 images, got 3"),
    "nan pair": (lambda: plots.reconstructions(GREY, GREY * NAN), "x_hat: expected finite"),
    "side": (lambda: plots.latent_grid(side=1), "side: expected a whole number, 2 to 1200, got 1"),
    "no square": (lambda: plots.manifold(GREY[:3]), "side.*got 3. To fix: decode latent_grid"),
    "one tile": (lambda: plots.manifold(GREY[:1]), "side.*got 1. To fix: decode latent_grid"),
    "no point": (lambda: plots.latent_lines(Z, dimensions=[0]), r"z: expected shape .D,., got \(4, 2\)"),
    "no axis": (
        lambda: plots.latent_lines(Z[0], dimensions=[]),
        "dimensions: expected one or more, got none",
    ),
    "no such axis": (
        lambda: plots.latent_lines(Z[0], dimensions=[1, 2]),
        r"dimensions: expected 0 to 1, got \[2\]",
    ),
    "one step": (
        lambda: plots.latent_lines(Z[0], dimensions=[0], steps=1),
        "steps: expected a whole number, 2",
    ),
    "ragged lines": (lambda: plots.traversals(GREY, dimensions=[0, 1, 2]), "each of 3 lines, got 4"),
    "no lines": (lambda: plots.traversals(GREY, dimensions=[]), "dimensions: expected one or more, got none"),
    "no end": (lambda: plots.latent_paths(Z, Z[:3]), r"end: expected shape \(4, 2\), .*got \(3, 2\)"),
    "one step of a path": (lambda: plots.latent_paths(Z, Z, steps=1), "steps: expected a whole number, 2 to"),
    "ragged paths": (lambda: plots.interpolations(GREY, steps=3), "x: expected a multiple of steps=3"),
    "too large z": (lambda: plots.latent_plane(Z.double() * 1e200), r"z: expected values of at most 1e\+100"),
    "two dtypes": (lambda: plots.latent_paths(Z, Z.double()), "end: expected torch.float32 on cpu as start"),
    "z rank": (lambda: plots.latent_plane(Z[0]), r"z: expected .* got \(2,\). To fix: pass one"),
    "no z": (lambda: plots.latent_plane(Z[:0]), r"z: expected .* got \(0, 2\)"),
    "z nan": (lambda: plots.latent_plane(Z * NAN), "z: expected finite"),
    "labels": (lambda: plots.latent_plane(Z, torch.arange(3)), r"labels: .*\(4,\), got \(3,\)"),
    "one-hot": (lambda: plots.latent_plane(Z, torch.eye(4)), r"got \(4, 4\).*one-hot"),
    "nan labels": (lambda: plots.latent_plane(Z, Z[:, 0] / 0), "labels: expected finite numbers"),
    "nameless": (lambda: plots.latent_plane(Z, torch.arange(4), classes=["a", "b"]), r"0 to 1, .*\[2.0, 3"),
    "unlabelled": (lambda: plots.latent_plane(Z, classes=["a"]), "labels: .*pass both"),
    "no epochs": (lambda: plots.learning_curves([]), "epochs: expected at least one"),
    "diverged": (lambda: plots.learning_curves([DIVERGED]), r"epochs: loss: .*got \[inf\]"),
    "no field": (
        lambda: plots.learning_curves([SimpleNamespace(epoch=1)]),
        "expected records with loss",
    ),
}


# What is no dense tensor of finite floats; x stands for any argument that is drawn.
IMAGES = GREY.numpy()
NO_FLOATS = {
    "None": (None, "x: expected a tensor, got None. To fix: pass a tensor."),
    "a text": ("x", "x: expected a tensor, got str."),
    "an array": (
        IMAGES,
        r"^x: expected a tensor, got numpy.ndarray. To fix: torch.from_numpy\(x\).float",
    ),
    "arrays": ([*IMAGES], r"got list. To fix: torch.from_numpy\(numpy.stack\(x\)\).float\(\)."),
    "numbers": ([[0.5]], r"got list. To fix: torch.tensor\(x\)."),
    "tensors": ([*GREY], r"got list. To fix: torch.stack\(x\)."),
    "a distribution": (Normal(GREY, 1.0), "got torch.Normal. To fix: pass its mean, x.mean."),
    "sparse": (
        GREY.to_sparse(),
        "real numbers, got a tensor of layout torch.sparse_coo. To fix: x.to_dense",
    ),
    "nested": (
        torch.nested.nested_tensor([*GREY], layout=torch.jagged),
        "got a nested tensor. To fix: x.to_padded_tensor",
    ),
    "meta": (GREY.to("meta"), "got a tensor on the meta device"),
    "complex": (GREY + 1j, "got a tensor of torch.complex64"),
    "whole numbers": (GREY.long(), r"x: expected floats, got torch.int64. To fix: x.float\(\)."),
    "truth values": (GREY > 0, r"x: expected floats, got torch.bool. To fix: x.float\(\)."),
    "8-bit floats": (GREY.to(torch.float8_e5m2), "x: expected floats, got torch.float8_e5m2"),
}
# argument -> what draws it
DRAWN: dict[str, Callable[[Any], object]] = {
    "x": plots.images,
    "x of pairs": lambda x: plots.reconstructions(x, GREY),
    "x_hat": lambda x: plots.reconstructions(GREY, x),
    "x of a grid": plots.manifold,
    "x of lines": lambda x: plots.traversals(x, dimensions=[0]),
    "x of paths": lambda x: plots.interpolations(x, steps=2),
    "z": plots.latent_plane,
    "z of lines": lambda z: plots.latent_lines(z, dimensions=[0]),
    "start": lambda z: plots.latent_paths(z, GREY),
    "end": lambda z: plots.latent_paths(GREY, z),
}


@pytest.mark.parametrize("argument", DRAWN)
@pytest.mark.parametrize(("value", "message"), NO_FLOATS.values(), ids=NO_FLOATS.keys())
def test_refuses_what_is_no_tensor_of_floats(argument: str, value: object, message: str) -> None:
    name = argument.split()[0]
    with pytest.raises(ValueError, match=re.sub(r"\bx\b", name, message)):
        DRAWN[argument](value)


LABELS = {name: case for name, case in NO_FLOATS.items() if "floats" not in case[1] and name != "None"} | {
    "one value": (torch.tensor(1.0), r"labels: expected shape \(4,\), got \(\)"),
}


@pytest.mark.parametrize(("value", "message"), LABELS.values(), ids=LABELS.keys())
def test_refuses_what_is_no_tensor_of_labels(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.sub(r"\bx\b", "labels", message)):
        plots.latent_plane(Z, value)


NO_NUMBERS = (None, "2", 2.0, NAN, True, -1, 0, [2], torch.tensor(2), 1j)
COUNTS: dict[str, Callable[[Any], object]] = {
    "columns": lambda k: plots.images(GREY, columns=k),
    "columns of pairs": lambda k: plots.reconstructions(GREY, GREY, columns=k),
    "side": lambda k: plots.latent_grid(side=k),
    "steps": lambda k: plots.interpolations(GREY, steps=k),
    "steps of lines": lambda k: plots.latent_lines(Z[0], dimensions=[0], steps=k),
    "steps of paths": lambda k: plots.latent_paths(Z, Z, steps=k),
}


@pytest.mark.parametrize("value", NO_NUMBERS, ids=str)
@pytest.mark.parametrize("argument", COUNTS)
def test_refuses_what_is_no_number_of_images(argument: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{argument.split()[0]}: expected a whole number.* To fix: "):
        COUNTS[argument](value)


@pytest.mark.parametrize(
    "shape", ["28", None, 28, (28.0, 28.0), (True, 784), (28, NAN), torch.ones(2), {28: 28}]
)
def test_refuses_what_is_no_shape(shape: Any) -> None:
    for draw in (plots.images, plots.manifold):
        with pytest.raises(ValueError, match=r"^shape: expected \(H, W\) or \(C, H, W\), whole numbers"):
            draw(GREY, shape=shape)


@pytest.mark.parametrize("dimensions", ["01", None, 1, [0.5], [-1], [True], torch.tensor([0, 1])])
def test_refuses_what_are_no_dimensions(dimensions: Any) -> None:
    for draw in (plots.traversals, lambda x, dimensions: plots.latent_lines(x[0], dimensions=dimensions)):
        with pytest.raises(ValueError, match="^dimensions: expected a list of whole numbers from 0, got "):
            draw(GREY, dimensions=dimensions)


@pytest.mark.parametrize("reach", ["3", None, True, 0, -1.0, NAN, math.inf, 1e300, 10**400])
def test_refuses_what_is_no_reach(reach: Any) -> None:
    with pytest.raises(ValueError, match="^reach: expected a positive number of torch.float32, got .*try 3"):
        plots.latent_lines(Z[0], dimensions=[0], reach=reach)


@pytest.mark.parametrize("classes", ["abcd", 4, [], [0, 1, 2, 3], [b"a"] * 4, {0: "a"}, Z[0]])
def test_refuses_what_are_no_names_of_classes(classes: Any) -> None:
    with pytest.raises(ValueError, match="^classes: expected one string for each label, got "):
        plots.latent_plane(Z, torch.arange(4), classes=classes)


@pytest.mark.parametrize("title", [None, 3, b"title", ["title"]])
def test_refuses_what_is_no_title(title: Any) -> None:
    with pytest.raises(ValueError, match="^title: expected a string, got "):
        plots.images(GREY, title=title)


@pytest.mark.parametrize(
    "epochs", ["epochs", None, 3, iter(records(2)), GREY, records(1)[0], [records(1)[0]._asdict()], [None]]
)
def test_refuses_what_are_no_epochs(epochs: Any) -> None:
    with pytest.raises(ValueError, match=r"^epochs: expected .*records.*To fix: pass .* list\(pv.fit\("):
        plots.learning_curves(epochs)


@pytest.mark.parametrize("value", ["1", None, True, NAN, 1e308, 10**400, torch.tensor(1.0)])
def test_refuses_epochs_without_numbers(value: Any) -> None:
    with pytest.raises(ValueError, match="^epochs: loss: expected finite numbers, got "):
        plots.learning_curves([records(1)[0]._replace(loss=value)])


def test_a_text_from_outside_is_drawn_as_it_is() -> None:
    odd = ["$\\bad{$", "_hidden", "", "$"]  # no formula of matplotlib; it would leave the second one out
    for figure in (
        plots.images(GREY, title=odd[0]),
        plots.latent_plane(Z, torch.arange(4), classes=odd),
        plots.latent_plane(uniform(12, 2), torch.arange(12), classes=3 * odd),
    ):
        figure.savefig(io.BytesIO(), dpi=40)  # a formula with a mistake raises here
    assert plots.images(GREY, title=odd[0]).axes[0].get_title() == odd[0]
    drawn = plots.latent_plane(Z, torch.arange(4), classes=odd).axes[0].get_legend()
    assert drawn is not None
    assert [text.get_text() for text in drawn.get_texts()] == odd


def test_an_image_has_at_least_a_dot() -> None:
    few = torch.zeros(1200, 1)
    assert shown(plots.images(few[:600], shape=(1, 1), columns=1)).shape == (1199, 1)
    for x, shape in ((few, (1, 1)), (torch.zeros(1, 1000), (1, 1000))):
        with pytest.raises(ValueError, match="^x: expected images that have a dot in a picture of 1200 dots"):
            plots.images(x, shape=shape, columns=1)


def test_a_notebook_shows_a_figure_by_itself() -> None:
    figure = plots.images(GREY, title="shown")
    assert isinstance(figure, NotebookFigure)
    saved = io.BytesIO()
    figure.savefig(saved, format="png")
    assert figure._repr_png_() == saved.getvalue()  # the method that IPython asks for
    assert all(isinstance(draw(), NotebookFigure) for draw in FIGURES.values())


def test_only_what_is_drawn_is_passed_by_position() -> None:
    drawn = {"x", "x_hat", "z", "labels", "start", "end", "epochs", "records", "stages"}
    for name in plots.__all__:
        for argument in inspect.signature(getattr(plots, name)).parameters.values():
            by_keyword = argument.kind is argument.KEYWORD_ONLY
            assert by_keyword == (argument.name not in drawn), (name, argument)


@pytest.mark.parametrize(("draw", "message"), REFUSALS.values(), ids=REFUSALS.keys())
def test_refuses(draw: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw()


def test_latent_lines_and_paths() -> None:
    z = torch.tensor([1.0, 2.0, 3.0])
    lines = plots.latent_lines(z, dimensions=[2, 0], steps=3, reach=2.0)
    expected = [[1, 2, -2], [1, 2, 0], [1, 2, 2], [-2, 2, 3], [0, 2, 3], [2, 2, 3]]
    assert torch.equal(lines, torch.tensor(expected, dtype=torch.float32))
    assert plots.latent_lines(z.clone().requires_grad_(), dimensions=[0]).requires_grad
    paths = plots.latent_paths(torch.stack([z, -z]), torch.stack([z + 2, 3 * z]), steps=3)
    assert torch.equal(paths[:3], torch.stack([z, z + 1, z + 2]))
    assert torch.equal(paths[3:], torch.stack([-z, z, 3 * z]))


def test_a_line_is_a_row_of_its_picture() -> None:
    x = torch.arange(6.0)[:, None] / 5
    figures = (
        plots.traversals(x, dimensions=[3, 7], shape=(1, 1)),
        plots.interpolations(x, shape=(1, 1), steps=3),
    )
    for figure in figures:
        drawn = figure.axes[0].images[0].get_array()
        assert drawn is not None
        torch.testing.assert_close(torch.as_tensor(drawn[::2, ::2].data), x.view(2, 3))
    labels = figures[0].axes[0].get_yticklabels()
    assert [label.get_text() for label in labels] == ["$z_{3}$", "$z_{7}$"]
