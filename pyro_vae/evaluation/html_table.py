"""html_table: rows of text as a table that a notebook shows."""

import math
from collections.abc import Mapping, Sequence
from html import escape

from torch import Tensor


def html_table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return the HTML of a table with a head. Each row begins with its name."""

    def line(cells: Sequence[str], tag: str) -> str:
        first, *others = (escape(cell) for cell in cells)
        return f"<tr><th>{first}</th>{''.join(f'<{tag}>{cell}</{tag}>' for cell in others)}</tr>"

    body = "".join(line(row, "td") for row in rows)
    return (
        f"<table><caption>{escape(caption)}</caption><thead>{line(head, 'th')}</thead>"
        f"<tbody>{body}</tbody></table>"
    )


def table_of_means(rows: Mapping[str, str], data: Tensor) -> str:
    """Return an HTML table of means over the data, in nats."""
    return html_table(
        f"mean ± standard error over {len(data):,} data", ["", "nats per data point"], [*rows.items()]
    )


def mean_and_error(values: Tensor) -> str:
    """Return the mean of values ``(N,)`` with its standard error, which a single value does not have."""
    values = values.double()
    error = f" ± {values.std() / math.sqrt(len(values)):.3f}" if len(values) > 1 else ""
    return f"{values.mean():.3f}{error}"
