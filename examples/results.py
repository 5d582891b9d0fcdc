"""What the scripts in this folder write. The folder is made when its first file is written."""

import argparse
import io
import json
import platform
import re
import sys
from importlib.metadata import version
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


def machine(device: torch.device) -> dict[str, Any]:
    """Return what a time depends on: the processor or GPU, the threads and the versions."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    names = (
        re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        if sys.platform == "linux"
        else []
    )
    processor = (
        gpu or f"{names[0] if names else platform.machine()} ({torch.backends.cpu.get_cpu_capability()})"
    )
    versions = {name: version(name) for name in ("torch", "pyro-ppl")}
    return {"processor": processor, "threads": torch.get_num_threads(), "versions": versions}


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
