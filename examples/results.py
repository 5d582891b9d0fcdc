"""What the scripts in this folder write. The folder is made when its first file is written."""

import argparse
import io
import json
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn


def write_summary(options: argparse.Namespace, numbers: dict[str, Any]) -> None:
    """Write the options, without the paths, and the numbers into ``summary.json``."""
    asked = {name: value for name, value in vars(options).items() if name not in ("out", "data_root")}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "summary.json").write_text(json.dumps(asked | numbers, indent=2, default=str) + "\n")


def save_weights(out: Path, model: nn.Module, guide: nn.Module) -> None:
    """Save the two state dicts in ``weights.pt``."""
    out.mkdir(parents=True, exist_ok=True)
    torch.save({"model": model.state_dict(), "guide": guide.state_dict()}, written := io.BytesIO())
    (out / "weights.pt").write_bytes(written.getbuffer())  # a full disk is an OSError here, not in torch


def save_pictures(out: Path, pictures: dict[str, Figure]) -> None:
    """Save each figure as ``<name>.png``."""
    out.mkdir(parents=True, exist_ok=True)
    for name, figure in pictures.items():
        figure.savefig(out / f"{name}.png")
