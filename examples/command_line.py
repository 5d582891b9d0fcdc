"""What the scripts in this folder share: types of options, the run, and what is written to the disk.

A script builds an ``argparse`` parser with its own options and calls ``run(main, parser, ...)``.
"""

import argparse
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn

# Types of options: text -> value. argparse prints the error as one line and exits with 2.


def count(text: str) -> int:
    """Read a positive whole number."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, got {text!r}")
    return int(text)


def positive(text: str) -> float:
    """Read a positive number."""
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return float(text)


def learning_rate(text: str) -> float:
    """Read a learning rate."""
    if not 0 < float(text) < 1:
        raise argparse.ArgumentTypeError(f"expected 0 < lr < 1, got {text!r}")
    return float(text)


def seed(text: str) -> int:
    """Read a seed for torch's random numbers."""
    if not 0 <= int(text) < 2**63:
        raise argparse.ArgumentTypeError(f"expected 0 <= seed < 2**63, got {text!r}")
    return int(text)


def device(text: str) -> torch.device:
    """Read a device that this machine has."""
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used: {reason}") from error


def folder(text: str) -> Path:
    """Read a folder that exists or can be made."""
    path = Path(text)
    existing = next(place for place in (path, *path.absolute().parents) if os.path.exists(place))
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"expected a folder that can be written, got {text!r}")
    return path


# The run.


def run(
    main: Callable[[argparse.Namespace], None],
    parser: argparse.ArgumentParser,
    *,
    num_samples: int,
    out: str,
) -> None:
    """Add the options that every script has, read the command line, set the seed and call ``main``.

    A ``ValueError`` or an ``OSError`` becomes one line and exit status 2; Ctrl-C one line and 130.

    Args:
        main: Trains, evaluates and writes, given the options.
        parser: Holds the script's own options.
        num_samples: Default number of importance samples for log p(x).
        out: Default folder for the results.
    """
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument(
        "--num-samples", type=count, default=num_samples, help="importance samples for log p(x)"
    )
    parser.add_argument("--out", type=folder, default=out, help="folder for the results")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    torch.set_flush_denormal(True)  # late in training, denormal numbers would slow a step
    try:
        main(options)
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted\n")


# What is written into options.out. The folder is made when its first file is written.


def write_summary(options: argparse.Namespace, numbers: dict[str, Any]) -> None:
    """Write the options, without the paths, and the numbers into ``summary.json``."""
    asked = {name: value for name, value in vars(options).items() if name not in ("out", "data_root")}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "summary.json").write_text(json.dumps(asked | numbers, indent=2, default=str) + "\n")


def save_weights(out: Path, model: nn.Module, guide: nn.Module) -> None:
    """Save the two state dicts in ``weights.pt``."""
    out.mkdir(parents=True, exist_ok=True)
    torch.save({"model": model.state_dict(), "guide": guide.state_dict()}, out / "weights.pt")


def save_pictures(out: Path, pictures: dict[str, Figure]) -> None:
    """Save each figure as ``<name>.png``."""
    out.mkdir(parents=True, exist_ok=True)
    for name, figure in pictures.items():
        figure.savefig(out / f"{name}.png")
