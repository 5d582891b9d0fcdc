"""Compare ELBO estimators over several seeds: value, bias, noise and cost.

    python examples/compare_elbos.py
    python examples/compare_elbos.py --pair linear-gaussian

Each seed trains a pair by the plain ELBO. Early, midway and late in training,
``pv.compare_elbos`` draws losses and gradients of all estimators on one batch.
Then every estimator trains a pair of its own for the same number of seconds of
one processor core (of the clock, on another device).
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from itertools import chain, repeat
from typing import Any, cast

import torch
from pyro.infer import ELBO, RenyiELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO

import pyro_vae as pv
from command_line import Parser, count, positive, run, several
from pairs import PAIRS, exact_loss
from results import machine, save_pictures, settings

LEARNING_RATE = 1e-3
STAGES = ("early", "mid", "late")
PARTS = [1 / 16, 1 / 8, 1 / 4, 1 / 2, 1]  # of the seconds, after which log p(x) is taken
OF_SEVERAL = ("RenyiELBO(0)", "IWAE", "DReG")  # bounds of k samples; with one they are the ELBO


def estimators(particles: list[int]) -> Iterator[tuple[str, int, ELBO]]:
    """Yield the name, the number of particles and the estimator."""
    for k in particles:
        options: dict[str, Any] = {"num_particles": k, "vectorize_particles": k > 1, "max_plate_nesting": 1}
        yield "Trace_ELBO", k, Trace_ELBO(**options)
        yield "TraceMeanField_ELBO", k, TraceMeanField_ELBO(**options)
        yield "TraceGraph_ELBO", k, TraceGraph_ELBO(**options)
        yield "MeanField", k, pv.MeanField(k)
        yield "STL", k, pv.STL(k)
        if k > 1:
            yield "RenyiELBO(0)", k, RenyiELBO(0, **options)
            yield "IWAE", k, pv.IWAE(k)
            yield "DReG", k, pv.DReG(k)


def new_svi(options: argparse.Namespace, seed: int, elbo: ELBO) -> pv.SVI:
    """Return an SVI over a new pair, with the first weights of a seed."""
    torch.manual_seed(seed)
    model, guide = (part.to(options.device) for part in PAIRS[options.pair][0](options.hidden_dim))
    optimizer = torch.optim.Adam(pv.parameters(model, guide), lr=LEARNING_RATE, fused=True)
    return pv.SVI(model, guide, optimizer, loss=elbo)


def compare(options: argparse.Namespace, seed: int, record: dict[str, Any]) -> None:
    """Train a pair by the plain ELBO, and compare all estimators on it at each stage."""
    svi, done = new_svi(options, seed, Trace_ELBO()), 0
    batches, x, _ = PAIRS[options.pair][1](options)
    stream, exact = chain.from_iterable(repeat(batches)), options.pair == "linear-gaussian"
    for stage, steps in zip(STAGES, options.stages, strict=True):
        for _ in range(steps - done):
            svi.step(next(stream))
        taken, targets, done = {}, {}, steps
        for name, k, elbo in estimators(options.particles):
            try:
                pv.SVI(svi.model, svi.guide, svi.optimizer, loss=elbo).evaluate_loss(x)
            except ValueError as refusal:
                record["refused"][name] = str(refusal)
                continue
            taken[f"{name} {k}"] = elbo
            targets[f"{name} {k}"] = exact_loss(k if name in OF_SEVERAL else 1)
        pair, model = (svi.model, svi.guide, x), cast(pv.Model, svi.model)
        evidence = pv.log_evidence(*pair, 10 * options.num_samples).values
        evidence = pv.references.evidence(model, x) if exact else evidence
        table = pv.compare_elbos(
            *pair, taken, options.draws, evidence=evidence.mean(), targets=targets if exact else {}, seed=seed
        )
        print(f"{options.pair}, seed {seed}, {stage}, after {steps} steps\n{table}\n", flush=True)
        for row in table.records:
            row |= {"seed": seed, "stage": stage, "estimator": row["estimator"].split()[0]}
            record["comparison"].append(row)
    record["snr_floor"] = table.snr_floor


def train(options: argparse.Namespace, seed: int, record: dict[str, Any]) -> None:
    """Train a pair by each estimator for the same time, and evaluate it on the way."""
    clock = time.process_time if options.device.type == "cpu" else time.perf_counter
    for name, k, elbo in estimators(options.train_particles):
        if name in record["refused"]:
            continue
        svi, steps, seconds = new_svi(options, seed, elbo), 0, 0.0
        batches, _, x_test = PAIRS[options.pair][1](options)
        stream = chain.from_iterable(repeat(batches))
        for part in PARTS:
            while not steps or seconds < part * options.seconds:
                x, start = next(stream), clock()
                svi.step(x)
                seconds += clock() - start
                steps += 1
            evidence = pv.log_evidence(svi.model, svi.guide, x_test, options.num_samples).mean().item()
            row = {"seed": seed, "estimator": name, "particles": k, "steps": steps, "seconds": seconds}
            record["training"].append(row | {"log_evidence": evidence})
        print(record["training"][-1], flush=True)


def main(options: argparse.Namespace) -> None:
    """Compare and train with each seed, write and draw."""
    torch.set_num_threads(1)
    record: dict[str, Any] = {"refused": {}, "comparison": [], "training": []}
    for seed in range(options.seed, options.seed + options.seeds):
        compare(options, seed, record)
        train(options, seed, record)
    about = {
        "command": " ".join(["python examples/compare_elbos.py", *sys.argv[1:]]),
        **settings(options),
        "protocol": PAIRS[options.pair][2],
        "unit": "nats per data point",
        "machine": machine(options.device),
    }
    lines = ",\n".join(f"{json.dumps(key)}: {written(value)}" for key, value in (about | record).items())
    pv.write_file(options.out / f"{options.pair}.json", f"{{\n{lines}\n}}\n")
    stages = {stage: [r for r in record["comparison"] if r["stage"] == stage] for stage in STAGES}
    save_pictures(options.out, {"signal": pv.plots.signal_over_particles(stages, floor=record["snr_floor"])})
    print(f"the record and its figure are in {options.out}")


def written(value: Any) -> str:
    """Return JSON with a line for each record, and numbers of five digits."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        rows = [{k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in r.items()} for r in value]
        return "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]"
    return json.dumps(value, indent=1)


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("--pair", choices=PAIRS, default="bernoulli", help="model, guide and data")
    parser.add_argument("--seeds", type=count, default=5, help="seeds, from --seed on")
    parser.add_argument("--stages", type=count, nargs=3, default=[100, 700, 5000], help="steps of training")
    parser.add_argument("--particles", type=count, nargs="+", default=[1, 5, 50], help="in the comparison")
    parser.add_argument("--draws", type=several, default=100, help="of every gradient that is compared")
    parser.add_argument("--compared-data", type=count, default=16, help="data points for the gradients")
    parser.add_argument("--train-particles", type=count, nargs="*", default=[1, 5], help="in the training")
    parser.add_argument("--seconds", type=positive, default=30, help="of one core, to train each estimator")
    parser.add_argument("--test-data", type=count, default=500, help="test data for log p(x)")
    parser.add_argument("--hidden-dim", type=several, default=400, help="units of a hidden layer")
    run(main, parser, num_samples=100, out="runs/compare_elbos")
