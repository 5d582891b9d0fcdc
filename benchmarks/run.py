"""Time this package and others on the same work, and write records that the documentation prints.

    pip install -e ".[bench]"
    python benchmarks/run.py                        # everything, about an hour
    python benchmarks/run.py --quick --out quick    # a few contenders and steps, to see whether it runs
    python benchmarks/run.py --only steps growth    # choose from: steps, epochs, training, growth
    python benchmarks/run.py --resume               # continue an interrupted run
    python benchmarks/run.py --only steps epochs --device cuda --out gpu    # on a GPU

The contenders are in `contenders/`, the measurements in `protocols.py`. A record is written after each part,
to `<out>/steps.json`, `epochs.json`, `training.json` and `growth.json`.
"""

import argparse
import json
import os
import platform
import shlex
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from contenders import CONTENDERS, HIDDEN, RATE, WIDTH, Work, taking_part
from process import cores
from protocols import Row, Size, epochs, growth, steps, training

PROTOCOLS = ["steps", "epochs", "training", "growth"]
QUICK = ["matrix products alone", "PyTorch, fused Adam", "pyro.infer.SVI, Trace", "pyro_vae, TraceMeanField"]


class Cell(NamedTuple):
    """One part of a protocol: the fields that all its rows share, and a function that makes the rows."""

    fields: Row
    rows: Callable[[], list[Row]]


def main(options: argparse.Namespace) -> None:
    """Run the chosen protocols."""
    size = Size(rounds=2, images=256, epochs=2, points=1) if options.quick else Size()
    if options.device != "cpu" and not options.quick:
        size = size._replace(images=10 * size.images)  # a step is too short for a few of them
    images = 2000 if options.quick else 60_000
    only = options.contenders or (QUICK if options.quick else None)
    both = [threads for threads in (1, 2) if threads <= len(cores())]
    threads = {"steps": both[:1] if options.quick else both, "epochs": [1], "training": [1]}
    if options.threads:
        if max(options.threads) > len(cores()):
            raise ValueError(
                f"--threads: expected at most {len(cores())}, the cores that this process may use, "
                f"got {max(options.threads)}. To fix: pass fewer threads."
            )
        threads = dict.fromkeys(threads, options.threads)
    batches = options.batch_size or ([128] if options.quick else [128, 256, 1024])
    if options.device != "cpu" and not {"steps", "epochs"}.issuperset(options.only):
        raise ValueError(
            "--device: expected with --only steps epochs, since the other protocols are of a CPU, got "
            f"{' '.join(options.only)}. To fix: add --only steps epochs."
        )
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        work = Work(Path(folder), images=images, device=options.device)
        test = unpack(work.folder)[:images]
        names = {protocol: taking_part(protocol, only, options.device) for protocol in PROTOCOLS}
        cells = {
            "steps": [
                Cell({"threads": n}, partial(steps, names["steps"], work, batches, n, size))
                for n in threads["steps"]
            ],
            "epochs": [
                Cell({"threads": n}, partial(epochs, names["epochs"], work, batches, n, size))
                for n in threads["epochs"]
            ],
            "training": [
                Cell(
                    {"threads": n, "seed": seed},
                    partial(training, names["training"], work._replace(seed=seed), test, n, size),
                )
                for n in threads["training"]
                for seed in options.seeds
            ],
            "growth": [Cell({}, partial(growth, names["growth"], work, size))],
        }
        for protocol in options.only:
            if names[protocol]:
                settings = {**size._asdict(), "training images": images, "batch": batches}
                file = options.out / f"{protocol}.json"
                record(file, cells[protocol], settings, options.device, resume=options.resume)


def record(file: Path, cells: list[Cell], settings: Row, device: str, *, resume: bool) -> None:
    """Run the cells of a protocol; write its record after each of them."""
    # They change the times: the C library's allocator, the device of JAX, and its precision.
    asked = ("GLIBC_TUNABLES", "JAX_PLATFORMS", "JAX_DEFAULT_MATMUL_PRECISION")
    variables = [f"{name}={os.environ[name]}" for name in asked if os.environ.get(name)]
    found: dict[str, Any] = {
        "command": shlex.join([*variables, "python", "benchmarks/run.py", *sys.argv[1:]]),
        "work": f"VAE {WIDTH}-{HIDDEN}-20, Bernoulli likelihood, Adam at {RATE}, the same initial weights",
        "settings": settings,
        "processor": processor(device),
        "versions": _versions(),
        "rows": [],
    }
    if resume and file.exists():
        earlier = json.loads(file.read_text())
        differing = [
            key for key in ("work", "settings", "processor", "versions") if earlier[key] != found[key]
        ]
        if differing:
            raise ValueError(
                f"--resume: expected the settings of this run, but {file} has other "
                f"{' and '.join(differing)}. To fix: run without --resume."
            )
        found = earlier
    for fields, rows in cells:
        if not any(fields.items() <= row.items() for row in found["rows"]):
            new = rows()
            found["rows"] += new
            file.write_text(json.dumps(found, indent=2) + "\n")
            for row in new:
                print("   ".join(f"{key} {value}" for key, value in row.items()), flush=True)


def unpack(folder: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Save the training images in the folder of the contenders. Return the test images."""
    import pyro_vae as pv

    np.save(folder / "train.npy", pv.data.load(train=True, root=folder).pixels.numpy())
    pixels: np.ndarray[Any, np.dtype[np.uint8]] = pv.data.load(train=False, root=folder).pixels.numpy()
    return pixels


def _versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "pyro-ppl", "numpyro", "jax", "flax", "optax"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def processor(device: str = "cpu") -> str:
    """Return the name of the processor and its vector instructions as torch sees them, or of the GPU."""
    import torch

    if device != "cpu":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()} ({torch.backends.cpu.get_cpu_capability()})"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__)
    of_a_cpu = [protocol for protocol in PROTOCOLS if protocol != "epochs"]  # training has epochs too
    parser.add_argument("--only", nargs="+", choices=PROTOCOLS, default=of_a_cpu)
    parser.add_argument(
        "--quick", action="store_true", help="a few contenders and rounds, to see whether it runs"
    )
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, metavar="NAME")
    parser.add_argument("--batch-size", type=int, nargs="+", help="of the steps")
    parser.add_argument(
        "--threads", type=int, nargs="+", help="of the steps (by default 1 and 2) and the training (1)"
    )
    parser.add_argument(
        "--device", default="cpu", help="of torch's contenders, such as cuda: steps and epochs only"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the training")
    parser.add_argument("--resume", action="store_true", help="keep the rows that are already in the record")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    try:
        main(parser.parse_args())
    except (ValueError, RuntimeError) as error:
        parser.exit(1, f"{error}\n{error.__cause__ or ''}\n")
