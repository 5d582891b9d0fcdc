"""Compare ELBO estimators on MNIST: their noise, their cost, what they train.

    python examples/compare_elbos.py

Every estimator trains a VAE for the same number of seconds of one processor
core (of the clock, on another device). Early, midway and late in the training
by the plain ELBO, ``pv.compare_elbos`` draws the gradients of all estimators.
The script writes a record and its figures.
"""

import argparse
import json
import sys
import time
from itertools import chain, repeat
from typing import Any

import torch
from matplotlib.figure import Figure
from pyro.infer import ELBO, Trace_ELBO
from torch import nn

import pyro_vae as pv
from command_line import Parser, count, positive, run, several
from results import save_pictures

LATENT_DIM, BATCH_SIZE, LEARNING_RATE = 20, 128, 1e-3
PARTS = [1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1]  # of the seconds, after which log p(x) is taken
STAGES = {1 / 64: "early", 1 / 8: "mid", 1: "late"}
COLOURS = {"Trace": "C0", "MeanField": "C1", "STL": "C2", "IWAE": "C3", "DReG": "C4"}


def estimators(k: int) -> dict[str, ELBO]:
    """Return the estimators with k particles each."""
    trace = Trace_ELBO(k, vectorize_particles=k > 1, max_plate_nesting=1)
    our = {"MeanField": pv.MeanField(k), "STL": pv.STL(k), "IWAE": pv.IWAE(k), "DReG": pv.DReG(k)}
    return {"Trace": trace, **our}


def main(options: argparse.Namespace) -> None:
    """Train, compare, write and draw."""
    torch.set_num_threads(1)
    protocol, train, device = pv.data.DynamicBinarisation(), pv.data.load(train=True), options.device
    x_test = pv.data.observe(pv.data.load(train=False), protocol)[: options.test_data].to(device)
    x_compared = pv.data.observe(train, protocol)[: options.compared_data].to(device)
    batches = pv.data.Batches(train, protocol, BATCH_SIZE, device=device)
    clock = time.process_time if device.type == "cpu" else time.perf_counter

    runs: dict[Any, dict[str, Any]] = {}
    for k in options.train_particles:
        for name, elbo in estimators(k).items():
            if k == 1 and name in ("IWAE", "DReG"):
                continue  # with one particle they are Trace and STL
            torch.manual_seed(options.seed)  # the same first weights for all
            decoder = nn.Sequential(pv.MLP(LATENT_DIM, options.hidden_dim, 784), pv.Bernoulli())
            encoder = nn.Sequential(pv.MLP(784, options.hidden_dim, 2 * LATENT_DIM), pv.DiagNormal())
            model = pv.Model(pv.StandardNormal(LATENT_DIM), decoder).to(device)
            guide = pv.Guide(encoder).to(device)
            optimizer = torch.optim.Adam(pv.parameters(model, guide), lr=LEARNING_RATE, fused=True)
            runs[name, k] = {"svi": pv.SVI(model, guide, optimizer, elbo), "steps": 0, "seconds": 0.0}

    stages, training, compared = [], [], []
    for part in PARTS:
        for (name, k), trained in runs.items():
            svi, stream = trained["svi"], chain.from_iterable(repeat(batches))
            while not trained["steps"] or trained["seconds"] < part * options.seconds:
                x, start = next(stream), clock()
                svi.step(x)
                trained["seconds"] += clock() - start
                trained["steps"] += 1
            evidence = pv.log_evidence(svi.model, svi.guide, x_test, options.num_samples).mean().item()
            done = {"steps": trained["steps"], "seconds": trained["seconds"], "log_evidence": evidence}
            training.append({"estimator": name, "particles": k, **done})
            print(training[-1])
        if part in STAGES:
            plain = next(iter(runs.values()))
            pair = plain["svi"].model, plain["svi"].guide, x_compared
            bound = pv.log_evidence(*pair, 10 * options.num_samples).mean().item()
            several = {f"{name} {k}": e for k in options.particles for name, e in estimators(k).items()}
            table = pv.compare_elbos(*pair, several, options.draws, evidence=bound)
            print(f"\n{STAGES[part]}, after {plain['steps']} steps\n{table}\n")
            stages.append({"stage": STAGES[part], "steps": plain["steps"], "log_evidence": bound})
            for r in table.records:
                compared.append({"stage": STAGES[part], **r, "estimator": r["estimator"].split()[0]})

    record = {
        "command": " ".join(["python examples/compare_elbos.py", *sys.argv[1:]]),
        **{name: value for name, value in vars(options).items() if name != "out"},
        "training_batch": f"{BATCH_SIZE} images, Adam at {LEARNING_RATE}, {LATENT_DIM} latents, one thread",
        "protocol": str(protocol),
        "unit": "nats a datum, log mass",
        "snr_floor": table.snr_floor,
        "stages": stages,
        "training": training,
        "comparison": compared,
    }
    pv.write_file(options.out / "compare-elbos.json", json.dumps(record, indent=1, default=str) + "\n")
    save_pictures(options.out, figures(record))
    print(f"the record and its figures are in {options.out}")


def figures(record: dict[str, Any]) -> dict[str, Figure]:
    """Draw a record: the signal in gradients, the two KLs, and log p(x) over seconds of training."""
    compared = record["comparison"]
    titles = {at["stage"]: f"{at['stage']}, {at['steps']:,} steps" for at in record["stages"]}
    by_stage = {titles[stage]: [r for r in compared if r["stage"] == stage] for stage in titles}
    signal = pv.plots.signal_over_particles(by_stage, floor=record["snr_floor"])

    axes = (kl := Figure(figsize=(8, 4.2), dpi=150, layout="tight")).subplots()
    alone = [r for r in compared if r["particles"] == min(record["particles"]) and r["group"] == "guide"]
    of = ((-0.2, "value_sd", 1, "the bound"), (0.2, "gradient_variance", 0.5, "the guide's gradient"))
    for shift, field, power, label in of:
        noise = {(r["estimator"], r["stage"]): r[field] ** power for r in alone}
        ratios = [noise["MeanField", stage] / noise["Trace", stage] for stage in titles]
        at = [place + shift for place in range(len(titles))]
        bars = axes.bar(at, [r - 1 for r in ratios], 0.36, bottom=1, label=f"noise in {label}")
        axes.bar_label(bars, [f"{ratio:.2f}" for ratio in ratios], padding=2)
    axes.axhline(1, color="k", lw=1)
    axes.set_xticks(range(len(titles)), titles.values())
    axes.set_title("Below 1 the KL in closed form makes less noise, above 1 it makes more")
    axes.set(ylabel="standard deviation, closed form / Monte Carlo", ymargin=0.15)
    axes.legend(frameon=False)

    axes = (trained := Figure(figsize=(8, 4.8), dpi=150, layout="tight")).subplots()
    for name, k in dict.fromkeys((r["estimator"], r["particles"]) for r in record["training"]):
        rows = [r for r in record["training"] if (r["estimator"], r["particles"]) == (name, k)][-4:]
        xy = [r["seconds"] for r in rows], [r["log_evidence"] for r in rows]
        axes.semilogx(*xy, "o-" if k == 1 else "s--", base=2, c=COLOURS[name], label=f"{name}, k = {k}")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="seconds of one core", ylabel="test log p(x) at least, nats a datum")
    axes.set_title("What each estimator has trained in equal time (higher is better)")
    axes.legend(frameon=False)
    return {"signal": signal, "kl": kl, "training": trained}


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("--seconds", type=positive, default=50, help="of one core, to train each estimator")
    parser.add_argument("--train-particles", type=count, nargs="+", default=[1, 5], help="in the training")
    parser.add_argument("--particles", type=count, nargs="+", default=[1, 5, 50], help="in the comparison")
    parser.add_argument("--draws", type=several, default=200, help="of every gradient that is compared")
    parser.add_argument("--compared-data", type=count, default=32, help="training images for the gradients")
    parser.add_argument("--test-data", type=count, default=500, help="test images for log p(x)")
    parser.add_argument("--hidden-dim", type=count, default=400, help="units of a hidden layer")
    run(main, parser, num_samples=100, out="runs/compare_elbos")
