"""What the scripts in this folder print and write: each file is whole at every moment."""

import argparse
import io
import json
import os
import pickle
import platform
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import torch
from matplotlib.figure import Figure
from torch import nn

import pyro_vae as pv


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options that decide about the numbers, as plain values."""
    others = ("out", "data_root", "resume", "checkpoint_every", "weights")
    asked = {name: value for name, value in vars(options).items() if name not in others}
    return {name: str(value) if isinstance(value, torch.device) else value for name, value in asked.items()}


def open_checkpoint(options: argparse.Namespace, every: int | None = None) -> pv.Checkpoint:
    """Return the checkpoint of a run, to be resumed if ``--resume`` says so."""
    path = options.out / "checkpoint.pt"
    return pv.Checkpoint(path, resume=options.resume, every=every, settings=settings(options))


def is_finished(options: argparse.Namespace, checkpoint: pv.Checkpoint) -> bool:
    """Say whether a run that is resumed has written all its files; the summary is the last."""
    summary = options.out / "summary.json"
    if checkpoint.resumes and summary.exists():
        print(f"{options.out} holds a finished run of these options: nothing is left to do")
        return True
    if checkpoint.resumes:
        print(f"{options.out}: the training goes on after epoch {len(checkpoint.epochs)}")
    summary.unlink(missing_ok=True)  # of an earlier run
    return False


def write_metrics(out: Path, epochs: list[pv.Epoch]) -> None:
    """Write a line of JSON for each epoch into ``metrics.jsonl``."""
    pv.write_file(out / "metrics.jsonl", "".join(json.dumps(epoch._asdict()) + "\n" for epoch in epochs))


def write_summary(options: argparse.Namespace, numbers: dict[str, Any]) -> None:
    """Write the options, without the paths, and the numbers into ``summary.json``."""
    asked = settings(options)
    pv.write_file(options.out / "summary.json", json.dumps(asked | numbers, indent=2, default=str) + "\n")


def machine(device: torch.device) -> dict[str, Any]:
    """Return what a time depends on: the processor or GPU, the threads and the versions."""
    name, cpuinfo = platform.machine(), Path("/proc/cpuinfo")
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif cpuinfo.exists() and (found := re.search("model name.*: (.*)", cpuinfo.read_text())):
        name = f"{found[1]} ({torch.backends.cpu.get_cpu_capability()})"
    versions = {package: version(package) for package in ("torch", "pyro-ppl")}
    return {"processor": name, "threads": torch.get_num_threads(), "versions": versions}


def save_weights(out: Path, model: nn.Module, guide: nn.Module) -> None:
    """Save the two state dicts in ``weights.pt``."""
    torch.save({"model": model.state_dict(), "guide": guide.state_dict()}, written := io.BytesIO())
    pv.write_file(out / "weights.pt", written.getvalue())


def existing_file(text: str) -> Path:
    """Read the name of a file that exists."""
    if not os.path.isfile(text):
        raise argparse.ArgumentTypeError(f"expected a file, got {text!r}. To fix: name one that exists.")
    return Path(text)


def load_weights(path: Path, model: nn.Module, guide: nn.Module) -> None:
    """Load what :func:`save_weights` wrote."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        for module, state in ((model, saved["model"]), (guide, saved["guide"])):
            module.load_state_dict(state)
    except (OSError, pickle.UnpicklingError, RuntimeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected the weights of this model and guide, got others, or another file. To fix: "
            "give the options that they were trained with."
        ) from error


def save_pictures(out: Path, pictures: dict[str, Figure]) -> None:
    """Save each figure as ``<name>.png``."""
    for name, figure in pictures.items():
        figure.savefig(written := io.BytesIO(), format="png", bbox_inches="tight")
        pv.write_file(out / f"{name}.png", written.getvalue())


def print_test(numbers: dict[str, Any], num_samples: int) -> None:
    """Print the numbers of the test images."""
    print(
        f"test, {numbers['protocol']}, {numbers['unit'].rpartition(', ')[2]} in nats per data point: "
        f"ELBO {numbers['test_elbo']:.2f} = reconstruction {numbers['test_reconstruction']:.2f} - "
        f"KL {numbers['test_kl']:.2f}, log p(x) at least {numbers['test_log_evidence']:.2f} "
        f"({num_samples} importance samples)"
    )


class Unread(io.TextIOBase):
    """Standard output, of which nobody may read the end, as with ``| head``: the run goes on."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Write a text, and show it at once."""
        try:
            written = self.stream.write(text)
            self.stream.flush()
            return written
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            return len(text)


@contextmanager
def standing(prog: str) -> Iterator[None]:
    """Go on where nobody reads the output; end in one line, with status 143, on SIGTERM."""

    def terminate(*_: object) -> None:
        print(f"{prog}: terminated", file=sys.stderr)
        raise SystemExit(143)

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        with redirect_stdout(Unread(sys.stdout)):
            yield
    finally:
        signal.signal(signal.SIGTERM, before)
