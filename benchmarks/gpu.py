"""All measurements on one GPU, in one run.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --device cpu --quick --out quick    # to see whether it runs

It needs torch, JAX with its GPU support, NumPyro, Flax and optax, and no network. First steps and epochs of
this package beside others, then `log_evidence` beside the bare products, then the tests that need a GPU. The
records are `<out>/steps.json`, `epochs.json` and `evidence.json`. The page on speed prints them.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
TESTS = HERE.parent / "tests" / "test_gpu.py"
SECONDS = {"steps and epochs": 270, "evidence": 80, "tests": 120}  # the most for each part: under 8 minutes
CONTENDERS = [
    "matrix products alone",
    "PyTorch, fused Adam",
    "PyTorch, CUDA graph",
    "pyro.infer.SVI, Trace",
    "NumPyro",
    "Flax, optax",
    "pyro_vae, TraceMeanField",
    "pyro_vae, compiled TraceMeanField",
]


def main(options: argparse.Namespace) -> int:
    """Run every part, also after one that fails. Return how many failed."""
    on = ["--device", options.device]
    size = ["--quick"] if options.quick else []
    images = ["--images", "64" if options.quick else "10000"]
    samples = ["--samples", "50" if options.quick else "5000"]
    parts = {
        "steps and epochs": [
            str(HERE / "run.py"),
            *("--only", "steps", "epochs", "--threads", "2", "--batch-size", "128", "1024"),
            *("--contenders", *CONTENDERS),
            *(*on, *size, "--out", str(options.out)),
        ],
        "evidence": [
            str(HERE / "evidence.py"),
            *(*on, *images, *samples, "--out", str(options.out / "evidence.json")),
        ],
        # Other versions of the packages may warn when they are imported.
        "tests": ["-m", "pytest", "-q", "-W", "default", "-p", "no:cacheprovider", str(TESTS)],
    }
    environment = os.environ | {"PYTHONPATH": str(HERE.parent)}  # also where the package is not installed
    options.out.mkdir(parents=True, exist_ok=True)
    failed = 0
    for name, part in parts.items():
        start = time.perf_counter()
        try:
            code = subprocess.run([sys.executable, *part], env=environment, timeout=SECONDS[name]).returncode
        except subprocess.TimeoutExpired:
            code = 124
        failed += code != 0
        print(f"{name}: exit status {code}, {time.perf_counter() - start:.0f} s", flush=True)
    return failed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--quick", action="store_true", help="few contenders and rounds, to see whether it runs"
    )
    parser.add_argument("--out", type=Path, default=Path("docs/results/gpu"))
    sys.exit(main(parser.parse_args()))
