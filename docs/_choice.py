"""The picture of what to choose: a question in each round box, an answer in each square one."""

from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure


class Box(NamedTuple):
    """A box at a place of a grid: columns to the right, rows down."""

    column: float
    row: float
    text: str
    answer: bool = False


BOXES = {
    "latents": Box(1, 0, "Has every latent rsample?\n(Normal, flows; not Categorical)"),
    "few": Box(0.35, 1.1, "Does it take few values?"),
    "sum": Box(0, 2.3, "sum it out:\nTraceEnum_ELBO, or IWAE\nwith infer={'enumerate': ...}", True),
    "score": Box(0.72, 2.3, "MeanField(k) or IWAE(k),\nk of 5 or more:\nthe score function", True),
    "bound": Box(1.75, 1.1, "Which bound?"),
    "elbo": Box(1.42, 2.3, "STL(1)", True),
    "tight": Box(2.08, 2.3, "DReG(k)", True),
    "report": Box(1, 3.5, "What is log p(x)?\nevidence_diagnostics: k-hat at most 0.7?"),
    "trust": Box(0.35, 4.6, "log_evidence", True),
    "anneal": Box(1.65, 4.6, "annealed_evidence", True),
    "gap": Box(1, 5.7, "Is the gap log p(x) - ELBO too large?\ninference_gaps: which part is the larger?"),
    "family": Box(0.35, 6.9, "approximation: a richer family\n(FullNormal, FlowNormal)", True),
    "encoder": Box(1.65, 6.9, "amortisation: a larger encoder,\na longer training", True),
}
ARROWS = [
    ("latents", "few", "no"),
    ("latents", "bound", "yes"),
    ("few", "sum", "yes"),
    ("few", "score", "no"),
    ("bound", "elbo", "the ELBO"),
    ("bound", "tight", "a tighter one"),
    ("report", "trust", "yes, of nearly all data"),
    ("report", "anneal", "no"),
    ("gap", "family", ""),
    ("gap", "encoder", ""),
]
PARTS = {"To train": 0, "To report": 3.5, "To improve": 5.7}


def draw_choice() -> None:
    """Draw the boxes, their arrows, and the three parts."""
    figure = Figure(figsize=(10, 8))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-0.75, 2.5), ylim=(7.5, -0.6))
    axes.axis("off")
    for text, row in PARTS.items():
        axes.text(-0.7, row, text, size=13, weight="bold", va="center", color="#4a6785")
    for row in (2.95, 5.15):
        axes.axhline(row, color="#c5d3e0", lw=1)
    for start, end, label in ARROWS:
        draw_arrow(axes, BOXES[start], BOXES[end], label)
    for box in BOXES.values():
        style = "square,pad=0.5" if box.answer else "round,pad=0.5,rounding_size=0.8"
        colour = "#e3edf7" if box.answer else "white"
        look = {"boxstyle": style, "facecolor": colour, "edgecolor": "#4a6785"}
        axes.text(box.column, box.row, box.text, size=10, ha="center", va="center", bbox=look)
    file = Path(__file__).parent / "_build" / "choice.svg"
    file.parent.mkdir(exist_ok=True)
    figure.savefig(file)


def draw_arrow(axes: Axes, start: Box, end: Box, label: str) -> None:
    """Draw an arrow from box to box, with a label at its middle."""
    ends = {"xy": (end.column, end.row - 0.33), "xytext": (start.column, start.row + 0.25)}
    axes.annotate("", **ends, arrowprops={"arrowstyle": "->", "color": "#4a6785", "shrinkA": 2})
    middle = ((start.column + end.column) / 2, (start.row + end.row) / 2)
    plain = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    axes.text(*middle, label, size=9, ha="center", va="center", color="#4a6785", bbox=plain)
