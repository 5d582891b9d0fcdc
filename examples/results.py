"""What the scripts in this folder write: each file is whole at every moment."""

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

import pyro_vae as pv


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options that decide about the numbers, as plain values."""
    others = ("out", "data_root", "resume", "checkpoint_every")
    asked = {name: value for name, value in vars(options).items() if name not in others}
    return {name: str(value) if isinstance(value, torch.device) else value for name, value in asked.items()}


def start_run(out: Path) -> None:
    """Remove the summary of an earlier run, so that this one is not taken for a finished one."""
    (out / "summary.json").unlink(missing_ok=True)


def is_finished(out: Path) -> bool:
    """Return whether the run in a folder has written all its files; the summary is the last."""
    return (out / "summary.json").exists()


def write_metrics(out: Path, epochs: list[pv.Epoch]) -> None:
    """Write a line of JSON for each epoch into ``metrics.jsonl``."""
    pv.write_file(out / "metrics.jsonl", "".join(json.dumps(epoch._asdict()) + "\n" for epoch in epochs))


def write_summary(options: argparse.Namespace, numbers: dict[str, Any]) -> None:
    """Write the options, without the paths, and the numbers into ``summary.json``."""
    asked = settings(options)
    pv.write_file(options.out / "summary.json", json.dumps(asked | numbers, indent=2, default=str) + "\n")


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
    torch.save({"model": model.state_dict(), "guide": guide.state_dict()}, written := io.BytesIO())
    pv.write_file(out / "weights.pt", written.getvalue())


def save_pictures(out: Path, pictures: dict[str, Figure]) -> None:
    """Save each figure as ``<name>.png``."""
    for name, figure in pictures.items():
        figure.savefig(written := io.BytesIO(), format="png", bbox_inches="tight")
        pv.write_file(out / f"{name}.png", written.getvalue())
