"""Compare the log evidence of latent structures on MNIST with dynamic binarisation.

    python benchmarks/structures.py --out docs/results/structures.json

All structures have the same encoder and decoder (784-400-400-20 and back, SiLU), optimiser, schedule, number
of epochs and seed. Only the prior or the posterior differs. Each structure is an entry of STRUCTURES. It is
recorded when it ends, and a recorded structure is not run again. So an interrupted run continues where it
stopped, and after a new entry is added only that entry is run.
"""

import argparse
import json
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pyro.infer import ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

import pyro_vae as pv

WIDTH, HIDDEN, LATENT, COMPONENTS = 784, 400, 20, 500
LR, BATCH = 3e-3, 128
EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.append(str(EXAMPLES))  # where the examples import command_line from
Structure = tuple[nn.Module, nn.Module, ELBO]


def encoder(family: pv.Family) -> nn.Sequential:
    """Return q(z | x) with a distribution of this family."""
    sizes = WIDTH, HIDDEN, HIDDEN, family.num_features(LATENT)
    return nn.Sequential(pv.MLP(*sizes, activation=nn.SiLU), family)


def decoder() -> nn.Sequential:
    """Return p(x | z)."""
    return nn.Sequential(pv.MLP(LATENT, HIDDEN, HIDDEN, WIDTH, activation=nn.SiLU), pv.Bernoulli())


def one_layer(
    family: Callable[[], pv.Family] = pv.DiagNormal,
    prior: Callable[[nn.Module, Tensor], nn.Module] = lambda _q, _x: pv.StandardNormal(LATENT),
) -> Callable[[Tensor], Structure]:
    """Return a structure with one latent z.

    Args:
        family: makes the family of the posterior.
        prior: makes the prior from q(z | x) and the images.
    """

    def make(images: Tensor) -> Structure:
        q = encoder(family())
        model, guide = pv.Model(prior(q, images), decoder()), pv.Guide(q)
        # Uses the KL in closed form if there is one, and a Monte Carlo estimate if not.
        return model, guide, pv.CompiledELBO(TraceMeanField_ELBO())

    return make


def example(name: str) -> dict[str, Any]:
    """Return the names that an example defines, such as its model and guide."""
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def mixture(_images: Tensor) -> Structure:
    """Return a mixture of ten components: k is summed out, and the means start at random points."""
    model = example("mixture")["Model"](10, LATENT, HIDDEN)
    nn.init.normal_(model.mean)
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    return model, pv.Guide(encoder(pv.DiagNormal())), pv.CompiledELBO(elbo)


def two_layers(_images: Tensor) -> Structure:
    """Return two latent layers, z2 and z1, with the guide that draws them in the model's order."""
    parts = example("hierarchical")
    return parts["Model"](HIDDEN), parts["TopDown"](HIDDEN), pv.CompiledELBO(TraceMeanField_ELBO())


# name: training images -> model, guide, ELBO. The others are compared with the first.
STRUCTURES: dict[str, Callable[[Tensor], Structure]] = {
    "factorised": one_layer(),
    "full covariance": one_layer(pv.FullNormal),
    "flow posterior": one_layer(lambda: pv.FlowNormal(LATENT)),
    "MixturePrior": one_layer(prior=lambda _q, _x: pv.MixturePrior(LATENT, COMPONENTS)),
    "VampPrior": one_layer(prior=lambda q, x: pv.VampPrior(q, x[:COMPONENTS])),
    "FlowPrior": one_layer(prior=lambda _q, _x: pv.FlowPrior(LATENT)),
    "two layers, top-down guide": two_layers,
    "mixture of ten, k summed out": mixture,
}


def run(name: str, options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train and evaluate a structure. Return its numbers; and its weights, with log p(x) of each image."""
    torch.manual_seed(options.seed)
    protocol = pv.data.DynamicBinarisation()
    train, test = pv.data.load(train=True), pv.data.load(train=False)
    batches = pv.data.Batches(train, protocol, BATCH)
    x_test = pv.data.observe(test, protocol)[: options.images]

    model, guide, elbo = STRUCTURES[name](pv.data.observe(train, pv.data.Grey()))
    optimizer = torch.optim.Adam(pv.parameters(model, guide), lr=LR, fused=True)
    steps = options.epochs * len(batches)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps)
    svi = pv.SVI(model, guide, optimizer, loss=elbo)
    seconds = 0.0
    for epoch in pv.fit(
        svi, batches, options.epochs, watch=x_test[:1000], scheduler=scheduler, progress=False
    ):
        seconds += epoch.seconds
        print(f"{name}: {epoch}", flush=True)

    torch.manual_seed(0)
    terms = pv.elbo_terms(model, guide, x_test)
    start = time.perf_counter()
    evidence = pv.log_evidence(model, guide, x_test, options.num_samples)
    numbers = {
        "structure": name,
        "parameters": sum(p.numel() for p in pv.parameters(model, guide)),
        "training seconds": round(seconds),
        "evidence seconds": round(time.perf_counter() - start),
        "test ELBO": round(terms.elbo.mean().item(), 2),
        "KL": round(terms.kl.mean().item(), 2),
        "log p(x) >=": round(evidence.mean().item(), 2),
    }
    kept = {"model": model.state_dict(), "guide": guide.state_dict(), "log_evidence": evidence.values}
    return numbers, kept


def ahead(values: Tensor, plain: Tensor) -> str:
    """Return by how many nats the values exceed those of the plain structure: mean over images and error."""
    difference = (values - plain).double()
    return f"{difference.mean():+.2f} ± {difference.std() / len(difference) ** 0.5:.2f}"


def main(options: argparse.Namespace) -> None:
    """Run the structures that are not in the record, and write the record after each of them."""
    torch.set_flush_denormal(True)
    torch.set_num_threads(1)
    settings = {
        "dataset": "mnist",
        "protocol": str(pv.data.DynamicBinarisation()),
        "unit": "nats per data point, log mass",
        "networks": f"{WIDTH}-{HIDDEN}-{HIDDEN}-{LATENT} and back, SiLU",
        "optimiser": f"Adam, one cycle to {LR}, batches of {BATCH}, 1 thread",
        "epochs": options.epochs,
        "seed": options.seed,
        "test images": options.images,
        "num_samples": options.num_samples,
    }
    command = f"python benchmarks/structures.py {' '.join(sys.argv[1:])}".strip()
    record: dict[str, Any] = {"command": command, **settings, "rows": []}
    if options.out.exists():
        record = json.loads(options.out.read_text())
        if {key: record.get(key) for key in settings} != settings:
            raise SystemExit(
                f"--out: expected the settings of this run, but {options.out} has others. To fix: give "
                "another --out."
            )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.runs.mkdir(parents=True, exist_ok=True)
    for name in STRUCTURES:
        if name in [row["structure"] for row in record["rows"]]:
            continue
        numbers, kept = run(name, options)
        torch.save(kept, options.runs / f"{name}.pt")
        plain = torch.load(options.runs / f"{next(iter(STRUCTURES))}.pt", weights_only=True)
        numbers["ahead of the first"] = ahead(kept["log_evidence"], plain["log_evidence"])
        record["rows"].append(numbers)
        record["rows"].sort(key=lambda row: list(STRUCTURES).index(row["structure"]))
        options.out.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        print(json.dumps(numbers, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=10_000, help="the number of test images")
    parser.add_argument("--num-samples", type=int, default=1000, help="importance samples per image")
    parser.add_argument("--runs", type=Path, default=Path("runs/structures"), help="for the weights")
    parser.add_argument("--out", type=Path, default=Path("runs/structures/structures.json"))
    main(parser.parse_args())
