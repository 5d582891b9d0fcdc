"""Reproduce a row of table 1 of Burda et al. 2015: log p(x) of MNIST.

    python examples/reproduce_iwae.py
    python examples/reproduce_iwae.py --layers 2 --objective dreg --k 5
    python examples/reproduce_iwae.py --weights runs/reproduce_iwae/weights.pt

Models, bounds and protocol are those of arXiv 1509.00519: one or two layers,
tanh, dynamic binarisation, 5,000 importance samples on all test images. The
schedule is ours: larger batches, and one cycle of the learning rate. With
--weights nothing is trained.
"""

import argparse
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

import pyro_vae as pv
from command_line import Parser, count, learning_rate, run, several, threads
from iwae_models import model_and_guide
from results import (
    existing_file,
    is_finished,
    load_weights,
    machine,
    open_checkpoint,
    save_weights,
    write_summary,
)

# The ELBO (two gradients of one bound), and the importance-weighted bound (two as well), of k samples.
OBJECTIVES = {"vae": pv.MeanField, "stl": pv.STL, "iwae": pv.IWAE, "dreg": pv.DReG}
# Passes over the data for each k; two layers get half of them. For one layer and k = 1, quick is ten minutes
# of training on one core.
PASSES = {"quick": {1: 240, 5: 90, 50: 12}, "full": {1: 1000, 5: 500, 50: 100}}


def seconds_of_a_step(
    loss: pv.CompiledELBO, model: nn.Module, guide: nn.Module, batches: Iterable[Tensor]
) -> float:
    """Time the loss and its gradients, once captured; leave the random numbers and weights alone."""
    with torch.random.fork_rng():
        x = next(iter(batches))
        for step in range(11):
            if step == 1:
                start = time.perf_counter()
            loss.loss_and_grads(model, guide, x)
    nn.ModuleList([model, guide]).zero_grad()
    return (time.perf_counter() - start) / 10


def main(options: argparse.Namespace) -> None:
    """Train, evaluate and write the row; or evaluate weights."""
    if options.threads:
        torch.set_num_threads(options.threads)
    protocol = pv.data.DynamicBinarisation()
    train, test = pv.data.load(train=True), pv.data.load(train=False)
    pair = model_and_guide(
        int(options.layers), options.prior, options.hidden_dim, train.pixels.float().mean(0) / 255
    )
    model, guide = (part.to(options.device) for part in pair)
    x_train, x_test = (pv.data.observe(images, protocol).to(options.device) for images in (train, test))
    name = f"{options.layers} layer{'s' * (options.layers == '2')}, {options.prior} prior"
    if options.weights:
        load_weights(options.weights, model, guide)
        numbers: dict[str, Any] = {}
    else:
        name = f"{name}, {options.objective}, k = {options.k}"
        batches = pv.data.Batches(train, protocol, options.batch_size, device=options.device)
        trained = fit(options, name, model, guide, batches)
        if trained is None:
            return
        numbers = trained
        save_weights(options.out, model, guide)

    log_p = pv.log_evidence(model, guide, x_test, options.num_samples, compiled=options.compiled)
    error = log_p.values.std().item() / len(x_test) ** 0.5  # over the test images
    if not options.weights:
        k, latents = int(options.k), pv.latent_terms(model, guide, x_test[:1000])
        numbers |= {
            "dataset": "mnist",
            "protocol": str(protocol),
            "unit": "nats per data point, log mass",
            "train_elbo": pv.elbo_terms(model, guide, x_train[:10000]).elbo.mean().item(),
            "test_elbo": pv.elbo_terms(model, guide, x_test).elbo.mean().item(),
            "train_bound": pv.log_evidence(model, guide, x_train[:10000], k).mean().item(),
            "test_bound": pv.log_evidence(model, guide, x_test, k).mean().item(),
            "test_log_evidence": log_p.mean().item(),
            "standard_error": error,
            "monte_carlo_error": log_p.standard_error.square().sum().sqrt().item() / len(x_test),
            "active_units": {site: int(terms.active.sum()) for site, terms in latents.items()},
            "machine": machine(options.device),
        }
        write_summary(options, numbers)
    print(
        f"{name}; mnist test, {protocol}, seed {options.seed}: -log p(x) {-log_p.mean():.2f} ± {error:.2f} "
        f"nats per data point ({options.num_samples} importance samples)"
    )


def fit(
    options: argparse.Namespace, name: str, model: nn.Module, guide: nn.Module, batches: pv.data.Batches
) -> dict[str, Any] | None:
    """Train, and return what that took; None if the run in the folder is finished."""
    checkpoint = open_checkpoint(options)
    if is_finished(options, checkpoint):
        return None
    k = int(options.k)
    passes = options.epochs or PASSES[options.budget][k] // int(options.layers)
    elbo = OBJECTIVES[options.objective](k)
    loss = pv.CompiledELBO(elbo, backend="inductor" if options.compiled else "eager")
    optimizer = torch.optim.Adam(pv.parameters(model, guide), lr=options.lr, fused=True)
    steps = passes * len(batches)
    scheduler = OneCycleLR(optimizer, options.lr, steps, pct_start=0.05, cycle_momentum=False)
    svi = pv.SVI(model, guide, optimizer, loss=loss)

    with torch.autocast(options.device.type, torch.bfloat16, enabled=options.bfloat16):
        expected = steps * seconds_of_a_step(loss, model, guide, batches)
        print(f"{name}: {passes} passes, at least {expected / 60:.1f} minutes of training", flush=True)
        for epoch in pv.fit(svi, batches, passes, scheduler=scheduler, checkpoint=checkpoint):
            print(epoch, flush=True)
    seconds = sum(epoch.seconds for epoch in checkpoint.epochs)
    return {"passes": passes, "steps": steps, "training_seconds": seconds}


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("--layers", choices=["1", "2"], default="1", help="of latents")
    parser.add_argument("--objective", choices=OBJECTIVES, default="stl", help="the bound and its gradient")
    parser.add_argument("--k", choices=["1", "5", "50"], default="1", help="samples of the objective")
    parser.add_argument("--budget", choices=PASSES, default="quick", help="how long to train")
    parser.add_argument("--prior", choices=["normal", "vamp", "flow"], default="normal", help="top p(z)")
    parser.add_argument("--hidden-dim", type=several, default=200, help="units of a hidden layer")
    parser.add_argument("--epochs", type=count, help="passes over the data (default: those of the budget)")
    parser.add_argument("--batch-size", type=count, default=250, help="images of a step")
    parser.add_argument("--lr", type=learning_rate, default=4e-3, help="the peak of its one-cycle schedule")
    parser.add_argument("--weights", type=existing_file, help="evaluate these only (default: none)")
    parser.add_argument("--compiled", action="store_true", help="compile the steps: seconds, then faster")
    parser.add_argument("--bfloat16", action="store_true", help="train in reduced precision, by autocast")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--threads", type=threads, help="CPU threads (default: as many as torch takes)")
    run(main, parser, num_samples=5000, out="runs/reproduce_iwae")
