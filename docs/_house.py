"""The picture of the house, drawn from the table of its rooms."""

import re
import textwrap
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle


def draw_house(page: str) -> None:
    """A box for each room, on its floor; five to a row."""
    rooms = re.findall(r"^\| (\d) \| `(\w+\.py)` \| ([^|]*) \|", page, re.MULTILINE)
    rows = []
    for floor in sorted({floor for floor, _, _ in rooms}):
        here = [(name, re.sub("`[^`]*`: |`", "", idea)) for number, name, idea in rooms if number == floor]
        few = -(-len(here) // -(-len(here) // 5))  # as even as they go
        rows += [(floor, here[i : i + few]) for i in range(0, len(here), few)]
    figure = Figure(figsize=(11, len(rows)))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-0.4, 10), ylim=(0.4, len(rows) + 0.6))
    axes.axis("off")
    for height, (floor, here) in enumerate(rows, 1):
        axes.text(-0.2, height, floor, va="center", ha="center", color="grey", size=13)
        width = 10 / len(here)
        for number, (name, idea) in enumerate(here):
            box = (number * width, height - 0.42)
            axes.add_patch(Rectangle(box, width - 0.1, 0.84, facecolor="#eef3f8", edgecolor="#4a6785"))
            centre = number * width + width / 2 - 0.05
            axes.text(centre, height + 0.22, name, va="center", ha="center", weight="bold", size=10)
            wrapped = textwrap.fill(re.split("[;:,]", idea)[0], int(14 * width))
            axes.text(centre, height - 0.12, wrapped, va="center", ha="center", size=8)
    file = Path(__file__).parent / "_build" / "house.svg"
    file.parent.mkdir(exist_ok=True)
    figure.savefig(file)
