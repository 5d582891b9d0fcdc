"""The picture of the house, drawn from the tables of its rooms."""

import re
import textwrap
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle


def rooms(page: str) -> dict[str, tuple[int, str, list[str]]]:
    """Return of each room its floor, its idea, and the files inside a folder."""
    files = re.findall(r"^\| `(\w+/)([\w/]+\.py)` \|", page, re.MULTILINE)
    table = re.findall(r"^\| (\d) \| `(\w+(?:\.py|/))` \| ([^|]*) \|", page, re.MULTILINE)
    return {
        room: (int(floor), re.sub("`", "", idea), [name for folder, name in files if folder == room])
        for floor, room, idea in table
    }


def draw_house(page: str) -> None:
    """Draw a box for each room on its floor, with its idea and its files."""
    found = rooms(page)
    floors = sorted({floor for floor, _, _ in found.values()})
    rows = []
    for floor in floors:
        here = [(room, idea, files) for room, (number, idea, files) in found.items() if number == floor]
        folders, plain = [r for r in here if r[2]], [r for r in here if not r[2]]
        rows += [(floor, row) for row in (plain, folders) if row]
    heights = [1.65 if row[0][2] else 1.1 for _, row in rows]
    figure = Figure(figsize=(11, 0.6 * sum(heights)))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-0.4, 10), ylim=(0, sum(heights)))
    axes.axis("off")
    bottom = 0.0
    for (floor, here), height in zip(rows, heights, strict=True):
        axes.text(-0.2, bottom + height / 2, floor, va="center", ha="center", color="grey", size=13)
        width = 10 / len(here)
        for number, (room, idea, files) in enumerate(here):
            colour = "#e3edf7" if files else "#f4f7fa"
            left, top = number * width, bottom + height - 0.05
            size = (width - 0.1, height - 0.1)
            axes.add_patch(Rectangle((left, bottom + 0.05), *size, facecolor=colour, edgecolor="#4a6785"))
            centre = left + width / 2 - 0.05
            axes.text(centre, top - 0.2, room, va="center", ha="center", weight="bold", size=11)
            wrapped = textwrap.fill(idea.split(";")[0].split(":")[-1].strip(), int(13 * width))
            axes.text(centre, top - 0.36, wrapped, va="top", ha="center", size=9)
            names = ", ".join(name.removesuffix(".py") for name in files)
            inside = textwrap.fill(names, int(12.5 * width), break_on_hyphens=False)
            axes.text(centre, bottom + 0.15, inside, va="bottom", ha="center", size=9, color="#4a6785")
        bottom += height
    file = Path(__file__).parent / "_build" / "house.svg"
    file.parent.mkdir(exist_ok=True)
    figure.savefig(file)
