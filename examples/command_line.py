"""The command line that the scripts in this folder share: types of options, and the run.

A script builds a ``Parser`` with its own options and calls ``run(main, parser, ...)``.
"""

import argparse
import contextlib
import os
import re
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

from results import standing

# Types of options: text -> value. argparse prints the error as one line and exits with 2.


def number(kind: type[int] | type[float], low: float, high: float) -> Callable[[str], float]:
    """Return a type of option: a number from ``low`` to ``high``."""
    expected = f"a {'whole ' if kind is int else ''}number from {low:,} to {high:,}"

    def read(text: str) -> float:
        with contextlib.suppress(ValueError):
            if low <= (value := kind(text)) <= high:  # NaN is not
                return value
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}. To fix: write such a number.")

    return read


count = number(int, 1, 10**6)
several = number(int, 2, 10**6)
positive = number(float, 1e-6, 1e6)
learning_rate = number(float, 1e-9, 1)
share = number(float, 0, 0.99)
seed = number(int, 0, 2**63 - 1)
threads = number(int, 1, os.cpu_count() or 1)


def device(text: str) -> torch.device:
    """Read a device that this machine has."""
    try:
        one = torch.ones(1, device=text)
        one.item()  # the device "meta" holds no numbers
    except Exception as error:  # each kind of device raises another type
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise argparse.ArgumentTypeError(
            f"expected a device that can train, got {text!r} ({reason}). To fix: write cpu."
        ) from error
    return one.device


def folder(text: str) -> Path:
    """Read a folder that can be written: write into it, and leave nothing behind."""
    path = Path(text)
    new = [place for place in (path, *path.parents) if not os.path.exists(place)]
    try:
        if not text or not text.isprintable():
            raise ValueError("an empty name, or a character that cannot be printed")
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(
            f"expected a folder that can be written, got {text!r}. To fix: choose another."
        ) from error
    finally:
        for place in new:
            with contextlib.suppress(OSError, ValueError):
                place.rmdir()
    return path


def data_folder(text: str) -> Path:
    """Read a folder of data: one that exists, or can be made for a download."""
    return Path(text) if os.path.isdir(text) else folder(text)


# The run.


class Parser(argparse.ArgumentParser):
    """Its help keeps the lines of the description and names every default; an error is one line."""

    def __init__(self, description: str | None) -> None:
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(usage=argparse.SUPPRESS, description=description, formatter_class=raw)
        self.allow_abbrev = False

    def add_argument(self, *names: str, **settings: Any) -> argparse.Action:
        """Add an option."""
        if "choices" in settings:
            settings |= {"metavar": "NAME", "help": f"{settings['help']}: {', '.join(settings['choices'])}"}
        default = settings.get("default")
        if default not in (None, argparse.SUPPRESS):
            default = " ".join(map(str, default)) if isinstance(default, list) else default
            settings["help"] += f" (default: {default})"
        return super().add_argument(*names, **settings)

    def error(self, message: str) -> NoReturn:
        """Print one line, and exit with status 2."""
        super().error(textwrap.shorten(message, 1000, placeholder=" ..."))


def run(main: Callable[[argparse.Namespace], None], parser: Parser, *, num_samples: int, out: str) -> None:
    """Add the options that every script has, read the command line, set the seed and call ``main``.

    What the user can repair becomes one line and exit status 2; Ctrl-C one line and 130.

    Args:
        main: Trains, evaluates and writes, given the options.
        parser: Holds the script's own options.
        num_samples: Default number of importance samples for log p(x).
        out: Default folder for the results.
    """
    add = parser.add_argument
    add("--num-samples", type=count, default=num_samples, help="importance samples for log p(x)")
    add("--seed", type=seed, default=0, help="of all random numbers")
    add("--device", type=device, default="cpu", help="to train on: cpu, cuda, cuda:1, mps")
    add("--out", type=folder, default=out, help="folder for the results")
    # Pyro warns of a NaN; the error of SVI then names its site.
    warnings.filterwarnings("ignore", "Encountered")
    try:
        for name in (names := [w.partition("=")[0] for w in sys.argv[1:] if w.startswith("--")]):
            if names.count(name) > 1:
                parser.error(f"argument {name}: expected it once, got it twice. To fix: leave one out.")
            if f"{name}=--" in sys.argv:  # argparse before Python 3.13 would take it for an empty list
                parser.error(f"argument {name}: expected a value, got '--'. To fix: write one.")
        options = parser.parse_args()
        torch.manual_seed(options.seed)
        torch.set_flush_denormal(True)  # late in training, denormal numbers would slow a step
        with standing(parser.prog):
            main(options)
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted\n")
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or re.search("out of memory|t allocate memory", str(error)):
            parser.error("memory: expected enough for these sizes, got too little. To fix: smaller ones.")
        if isinstance(error, RuntimeError):
            raise
        if isinstance(error, OSError):
            parser.error(f"files: expected to read and write them, got {error}. To fix: look at the disk.")
        parser.error(str(error))
