"""Time this package beside others on the same work; write records that the documentation prints.

    pip install -e ".[bench]"
    python benchmarks/run.py                      # everything, about 25 minutes
    python benchmarks/run.py --quick              # a few contenders, a minute's part of it
    python benchmarks/run.py --only steps growth  # of: steps, training, growth
    python benchmarks/run.py --resume             # go on where a run was interrupted

The contenders are in `contenders/`, what is done with them in `protocols.py`. A record is written
after each part, to `<out>/steps.json`, `training.json` and `growth.json`.
"""

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from contenders import CONTENDERS, WIDTH, Work, taking_part
from process import cores
from protocols import Row, Size, growth, steps, training

PROTOCOLS = ["steps", "training", "growth"]
QUICK = ["matrix products alone", "PyTorch, fused Adam", "pyro.infer.SVI, Trace", "pyro_vae, TraceMeanField"]


def main(options: argparse.Namespace) -> None:
    """Run the parts that were asked for."""
    if max(options.threads) > len(cores()):
        raise ValueError(
            f"--threads {max(options.threads)} needs as many cores, and this process may use {len(cores())}. "
            "Free more, or ask for fewer threads."
        )
    size = Size(rounds=2, images=256, epochs=2, points=1) if options.quick else Size()
    images = 2000 if options.quick else 60_000
    only = options.contenders or (QUICK if options.quick else None)
    names = {protocol: taking_part(protocol, only) for protocol in PROTOCOLS}
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        work = Work(Path(folder), images=images)
        test = unpack(work.folder)[:images]
        # Each part: what is written beside its rows, and how they are made.
        plan: dict[str, list[tuple[Row, Callable[[], list[Row]]]]] = {
            "steps": [
                (
                    {"threads": threads},
                    partial(steps, names["steps"], work, options.batch_size, threads, size),
                )
                for threads in options.threads
            ],
            "training": [
                (
                    {"seed": seed},
                    partial(training, names["training"], work._replace(seed=seed), test, 1, size),
                )
                for seed in options.seeds
            ],
            "growth": [({}, partial(growth, names["growth"], work, 1, size))],
        }
        for name in options.only:
            _record(options.out / f"{name}.json", plan[name], size, work, resume=options.resume)


def _record(
    file: Path, cells: list[tuple[Row, Callable[[], list[Row]]]], size: Size, work: Work, *, resume: bool
) -> None:
    """Run the cells of a protocol, writing the record after each."""
    settings = {**size._asdict(), "training images": work.images}
    record: dict[str, Any] = {
        "command": " ".join(["python benchmarks/run.py", *sys.argv[1:]]),
        "work": f"VAE {WIDTH}-400-20, Bernoulli likelihood, Adam at 1e-3, float32, the same initial weights",
        "settings": settings,
        "processor": _processor(),
        "versions": _versions(),
        "rows": [],
    }
    if resume and file.exists():
        found = json.loads(file.read_text())
        if any(found[key] != record[key] for key in ("settings", "processor", "versions")):
            raise ValueError(f"{file} is of other settings or of another machine: run without --resume.")
        record["rows"] = found["rows"]
    for labels, run in cells:
        if any(labels.items() <= row.items() for row in record["rows"]):
            continue
        rows = run()
        record["rows"] += rows
        file.write_text(json.dumps(record, indent=2) + "\n")
        for row in rows:
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)


def unpack(folder: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Put the training images where the contenders find them; return the test images."""
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


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__)
    parser.add_argument("--only", nargs="+", choices=PROTOCOLS, default=PROTOCOLS)
    parser.add_argument("--quick", action="store_true", help="a few contenders and rounds: does it run?")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, metavar="NAME")
    parser.add_argument("--batch-size", type=int, nargs="+")
    parser.add_argument("--threads", type=int, nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the training")
    parser.add_argument("--resume", action="store_true", help="keep the rows that are on record")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    arguments = parser.parse_args()
    arguments.batch_size = arguments.batch_size or ([128] if arguments.quick else [128, 256, 1024])
    arguments.threads = arguments.threads or ([1] if arguments.quick else [1, 2])
    main(arguments)
