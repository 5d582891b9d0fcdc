"""NotebookFigure: a figure of matplotlib without pyplot, which a notebook shows.

Such a figure needs no display and belongs only to its caller; ``figure.savefig(path)`` saves it.
"""

import io
from collections.abc import Sequence
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

DPI = 150


class NotebookFigure(Figure):
    """A figure of matplotlib. A notebook shows it as the last line of a cell, without any magic."""

    def _repr_png_(self) -> bytes:
        # IPython asks for this only while its inline backend, which draws every figure, is not loaded.
        file = io.BytesIO()
        self.savefig(file, format="png")
        return file.getvalue()


def legend(of: Axes | Figure, handles: Sequence[Artist], names: Sequence[str], **place: Any) -> None:
    """Add a legend whose names are drawn as they are: no formula, and none left out for a leading "_"."""
    drawn = of.legend(handles, [str(k) for k in range(len(names))], frameon=False, **place)
    for text, name in zip(drawn.get_texts(), names, strict=True):
        text.set(text=name, parse_math=False)


def plain(axes: Axes) -> None:
    """Leave out the frame at the top and on the right, and draw a light grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
