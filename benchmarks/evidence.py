"""Time log_evidence at scale: images per second, share of the matrix-product rate, peak memory.

    python benchmarks/evidence.py
    python benchmarks/evidence.py --device cuda --out gpu/evidence.json

The work: a VAE 784-400-20 with a Bernoulli likelihood, 10,000 binary images, 5,000 importance samples per
image, compiled, in float32 and in bfloat16. The weights are random; their products cost the same as those
of trained weights. Uncompiled runs get fewer images. On a GPU the work takes seconds, so a first run fills
the compiler's cache and is not timed. The rate of the matrix products alone is measured before and after
each run, for the large layer of the decoder, on a CPU with the faster of torch's two libraries.
"""

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import pyro_vae as pv
from contenders import HIDDEN, WIDTH
from process import peak_memory
from run import processor

LATENT, ROWS = 20, 4096


def rate(dtype: torch.dtype, device: str, seconds: float = 2.0) -> float:
    """Return the GFLOP/s of a product (rows, hidden) @ (hidden, width)."""
    rows = ROWS if device == "cpu" else 16 * ROWS
    h, w = torch.randn(rows, HIDDEN).to(device, dtype), torch.randn(WIDTH, HIDDEN).to(device, dtype)
    products: list[Callable[[], Tensor]] = [lambda: h @ w.T]
    if device == "cpu":
        products.append(lambda: torch.ops.mkldnn._linear_pointwise(h, w, None, "none", [], ""))
    found = []
    for product in products:
        wait_for(product())
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < seconds / len(products):
            for _ in range(20):
                last = product()
            wait_for(last)
            count += 20
        found.append(count * 2e-9 * rows * HIDDEN * WIDTH / (time.perf_counter() - start))
    return max(found)


def wait_for(result: Tensor) -> None:
    """Wait until a GPU has computed a result."""
    float(result[0, 0])


def main(options: argparse.Namespace) -> None:
    """Run all four and write the record."""
    device = options.device
    if device == "cpu":
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    decoder = nn.Sequential(pv.MLP(LATENT, HIDDEN, WIDTH), pv.Bernoulli())
    encoder = nn.Sequential(pv.MLP(WIDTH, HIDDEN, 2 * LATENT), pv.DiagNormal())
    model, guide = pv.Model(pv.StandardNormal(LATENT), decoder), pv.Guide(encoder)
    model, guide = model.to(device), guide.to(device)
    x = torch.rand(options.images, WIDTH).round().to(device)
    rows = []
    # Peak memory never falls within a process, so the runs that need least memory go first.
    for dtype, compiled in [(dtype, c) for c in (True, False) for dtype in (torch.float32, torch.bfloat16)]:
        images = x if compiled else x[: max(64, len(x) // 20)]
        before = rate(dtype, device)
        if compiled and device != "cpu":
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                pv.log_evidence(model, guide, images, options.samples, compiled=True)
        start = time.perf_counter()
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            value = pv.log_evidence(model, guide, images, options.samples, compiled=compiled).mean()
        seconds = time.perf_counter() - start
        products = (before + rate(dtype, device)) / 2
        flop = 2e-9 * (LATENT * HIDDEN + HIDDEN * WIDTH) * len(images) * options.samples
        row = {"precision": str(dtype).removeprefix("torch."), "compiled": compiled, "images": len(images)}
        row |= {"seconds": round(seconds, 1), "images/s": round(len(images) / seconds, 2)}
        row |= {"GFLOP/s": round(flop / seconds), "products, GFLOP/s": round(products)}
        row |= {"share": round(flop / seconds / products, 3), "log p(x), nats": round(value.item(), 3)}
        memory = peak_memory() if device == "cpu" else torch.cuda.max_memory_allocated() / 2**20
        row |= {"peak memory, MB": round(memory)}
        rows.append(row)
        print("   ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    record = {
        "command": shlex.join(["python", "benchmarks/evidence.py", *sys.argv[1:]]),
        "work": f"log_evidence of a VAE {WIDTH}-{HIDDEN}-{LATENT}, {options.samples} importance samples",
        "threads": options.threads,
        "processor": processor(device),
        "torch": torch.__version__,
        "rows": rows,
    }
    options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--samples", type=int, default=5_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("docs/results/evidence.json"))
    main(parser.parse_args())
