"""Table: rows of text, aligned in print, and drawn by a notebook."""

import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

from torch import Tensor

_NUMBER = re.compile(r"[-+]?(\d|inf|nan)[\d.,e+±infna -]*")


class Table(NamedTuple):
    """A table of text. The first row is its head, and each row begins with its name."""

    title: str
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def __str__(self) -> str:
        columns = [_aligned(column) for column in zip(*self.rows, strict=True)]
        lines = ["  ".join(cells).rstrip() for cells in zip(*columns, strict=True)]
        lines.insert(1, "-" * max(map(len, lines)))
        notes = ["", *self.notes] if self.notes else []
        return "\n".join([self.title, "", *lines, *notes])

    def _repr_html_(self) -> str:
        head, *body = self.rows
        notes = "".join(f"<p>{escape(note)}</p>" for note in self.notes)
        return (
            f"<table><caption>{escape(self.title)}</caption><thead>{_html(head, 'th')}</thead>"
            f"<tbody>{''.join(_html(row, 'td') for row in body)}</tbody></table>{notes}"
        )


def table_of_means(rows: Mapping[str, Tensor | str], data: Tensor) -> Table:
    """Return a table of means over the data, in nats. A value ``(N,)`` shows as its mean and error."""
    head = ["", "nats per data point"]
    cells = [
        [name, value if isinstance(value, str) else _mean_and_error(value)] for name, value in rows.items()
    ]
    return Table(f"mean ± standard error over {len(data):,} data", [head, *cells])


def _mean_and_error(values: Tensor) -> str:
    """Return the mean of values ``(N,)`` with its standard error, which a single value does not have."""
    values = values.double()
    error = f" ± {values.std() / math.sqrt(len(values)):.3f}" if len(values) > 1 else ""
    return f"{float(values.mean()):z.3f}{error}"


def _aligned(column: Sequence[str]) -> list[str]:
    """Return the cells in one width: numbers on the right, texts on the left."""
    width = max(map(len, column))
    numbers = all(map(_NUMBER.fullmatch, filter(None, column[1:])))
    return [cell.rjust(width) if numbers else cell.ljust(width) for cell in column]


def _html(row: Sequence[str], tag: str) -> str:
    name, *cells = map(escape, row)
    return f"<tr><th>{name}</th>{''.join(f'<{tag}>{cell}</{tag}>' for cell in cells)}</tr>"
