"""Hold annealed importance sampling against importance sampling, on a trained VAE.

    python examples/mnist_svi.py --out runs/default
    python benchmarks/annealed.py --run runs/default

On test images: do both agree where ``evidence_diagnostics`` trusts the importance weights, and where it does
not? On images simulated from the model: between which two bounds does log p(x) lie?
"""

import argparse
import json
import math
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pyro_vae as pv
from run import processor

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from mnist_svi import model_and_guide
from results import load_weights


def timed(estimate: Callable[..., Any], *args: Any, **options: Any) -> tuple[Any, float]:
    """Return a result and its seconds."""
    start = time.perf_counter()
    return estimate(*args, **options), time.perf_counter() - start


def mean(values: Tensor) -> dict[str, Any]:
    """Return the mean of values with its standard error, and their number."""
    values = values.double()
    error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": float(values.mean()) if len(values) else None, "error": error, "images": len(values)}


def bound(estimator: str, found: Any, seconds: float) -> dict[str, Any]:
    """Return a row about a bound: its mean, and the Monte Carlo error of that."""
    noise = float(found.standard_error.double().square().sum().sqrt()) / len(found.values)
    row = {"estimator": estimator, "log p(x) >=": round(float(found.mean()), 3), "Monte Carlo error": noise}
    row |= {"seconds": round(seconds, 1), "seconds an image": round(seconds / len(found.values), 3)}
    print("   ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return row


def main(options: argparse.Namespace) -> None:
    """Estimate both ways, and write the record."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(options.seed)
    model, guide = model_and_guide(pv.Bernoulli(), 784, 20, 400)
    load_weights(options.run / "weights.pt", model, guide)
    protocol = pv.data.DynamicBinarisation()
    x = pv.data.observe(pv.data.load(train=False), protocol)[: options.images]

    weighed, seconds = timed(pv.log_evidence, model, guide, x, options.samples)
    rows = [{"data": "test"} | bound(f"log_evidence, {options.samples:,} samples", weighed, seconds)]
    annealed, seconds = timed(pv.annealed_evidence, model, guide, x)
    rows.append({"data": "test"} | bound("annealed_evidence", annealed, seconds))
    diagnostics = pv.evidence_diagnostics(model, guide, x, options.samples)
    difference = annealed.values - weighed.values
    trusted, k = diagnostics.trusted, diagnostics.pareto_k
    groups = {f"k-hat at most {diagnostics.threshold:.2f}": trusted, "k-hat above that": ~trusted}
    agreement = [{"images with": name} | mean(difference[group]) for name, group in groups.items()]

    with torch.no_grad():
        z = torch.randn(options.images, 20)
        x = model.decoder(z).sample()
    weighed, seconds = timed(pv.log_evidence, model, guide, x, options.samples)
    rows.append({"data": "simulated"} | bound(f"log_evidence, {options.samples:,} samples", weighed, seconds))
    annealed, seconds = timed(pv.annealed_evidence, model, guide, x, latents={"z": z})
    rows.append({"data": "simulated"} | bound("annealed_evidence, both bounds", annealed, seconds))
    width = mean(annealed.upper - annealed.values)
    record = {
        "command": shlex.join(["python", "benchmarks/annealed.py", *sys.argv[1:]]),
        "protocol": str(protocol),
        "seed": options.seed,
        "unit": "nats per data point",
        "threads": 1,
        "processor": processor(),
        "torch": torch.__version__,
        "bounds": rows,
        "agreement": agreement,
        "k-hat, median": float(k.median()),
        "sandwich": {"log p(x) <=": round(float(annealed.upper.mean()), 3), "upper - lower": width},
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({key: record[key] for key in ("agreement", "sandwich")}, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/default"), help="folder with weights.pt")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--samples", type=int, default=5000, help="importance samples for each image")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("docs/results/annealed.json"))
    main(parser.parse_args())
