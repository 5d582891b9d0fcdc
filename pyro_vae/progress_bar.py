"""A progress bar on standard error, for a person in a terminal or a notebook."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress_bar(iterable: Iterable[Any] | None = None, *, shows: bool = True, **options: Any) -> "tqdm[Any]":
    """Return a tqdm bar, which is removed at its end. A file gets nothing of it."""
    return tqdm(iterable, leave=False, disable=not (shows and _is_watched(sys.stderr)), **options)


def _is_watched(stream: Any) -> bool:
    notebook = type(stream).__module__.startswith("ipykernel")  # its streams are no terminals
    return notebook or (hasattr(stream, "isatty") and stream.isatty())
