"""Train the model of mnist_svi.py in several processes.

    torchrun --nproc-per-node 2 examples/distributed.py
    torchrun --nproc-per-node 2 examples/distributed.py --resume

Every process takes a part of each batch. The loss is a sum over the data, so
the gradient of a whole batch is the sum of theirs.
"""

import argparse
import os
import time

import torch
from torch import Tensor, distributed
from torch.distributed import HashStore  # type: ignore[attr-defined]

import pyro_vae as pv
from command_line import Parser, count, learning_rate, run
from mnist_svi import ELBOS, LIKELIHOODS, draw, model_and_guide
from results import open_checkpoint, print_test, save_weights, write_metrics, write_summary


def sum_gradients(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Replace each gradient by its sum over the processes: one message, right before the update."""
    ps = [p for group in optimizer.param_groups for p in group["params"]]
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in ps])
    distributed.all_reduce(flat)
    for p, gradient in zip(ps, flat.split([p.numel() for p in ps]), strict=True):
        p.grad = gradient.view_as(p)


def mean(values: list[float]) -> list[float]:
    """Return means over the processes."""
    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    total = torch.tensor(values, dtype=torch.float64, device=device)
    distributed.all_reduce(total)
    return (total / distributed.get_world_size()).tolist()


def mine(x: Tensor) -> Tensor:
    """Return the rows of this process: as many as each of the others has."""
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    return x[rank::ranks][: len(x) // ranks]


def train_and_evaluate(options: argparse.Namespace) -> None:
    """Train, print and write as mnist_svi.py does, in the process of rank 0."""
    start = time.perf_counter()
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    likelihood, protocol, kind = LIKELIHOODS[options.likelihood]
    train, test = pv.data.load(train=True), pv.data.load(train=False)
    size = max(1, options.batch_size // ranks)
    batches = pv.data.Batches(mine(train.pixels), protocol, size, device=options.device)
    x_test = pv.data.observe(test, protocol).to(options.device)

    # The same parameters in every process; from here on, other random numbers in each.
    model, guide = model_and_guide(likelihood, x_test.shape[1], options.latent_dim, options.hidden_dim)
    model, guide = model.to(options.device), guide.to(options.device)
    torch.manual_seed(options.seed + rank)
    loss = pv.CompiledELBO(ELBOS[options.elbo]) if options.compiled else ELBOS[options.elbo]
    optimizer = torch.optim.Adam(pv.parameters(model, guide), lr=options.lr, fused=True)
    optimizer.register_step_pre_hook(sum_gradients)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, options.epochs * len(batches))
    svi = pv.SVI(model, guide, optimizer, loss=loss)
    checkpoint = open_checkpoint(options)
    epochs = pv.fit(
        svi,
        batches,
        options.epochs,
        watch=x_test[:1000],
        scheduler=scheduler,
        progress=rank == 0,
        checkpoint=checkpoint,
    )
    for epoch in epochs:
        (loss_of_all,) = mean([epoch.loss])
        if rank == 0:
            print(epoch._replace(loss=loss_of_all))
            write_metrics(options.out, checkpoint.epochs)

    x = mine(x_test)
    terms = [term.mean().item() for term in pv.elbo_terms(model, guide, x)]
    log_p = pv.log_evidence(model, guide, x, options.num_samples).mean().item()
    elbo, reconstruction, kl, log_evidence = mean([*terms, log_p])
    if rank == 0:
        numbers = {
            "protocol": str(protocol),
            "unit": f"nats per data point, log {kind}",
            "processes": ranks,
            "test_elbo": elbo,
            "test_reconstruction": reconstruction,
            "test_kl": kl,
            "test_log_evidence": log_evidence,
            "seconds": time.perf_counter() - start,
        }
        save_weights(options.out, model, guide)
        draw(options.out, model, guide, x_test, test, checkpoint.epochs)
        write_summary(options, numbers)
        print_test(numbers, options.num_samples)


def main(options: argparse.Namespace) -> None:
    """Join the processes that torchrun has started."""
    if options.device.type == "cuda":
        options.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    backend = "nccl" if options.device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        distributed.init_process_group(backend)
    else:  # without torchrun: one process alone
        distributed.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    try:
        train_and_evaluate(options)
    finally:
        distributed.destroy_process_group()


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("--likelihood", choices=LIKELIHOODS, default="bernoulli", help="p(x | z)")
    parser.add_argument("--elbo", choices=ELBOS, default="mean-field", help="how the KL is taken")
    parser.add_argument("--latent-dim", type=count, default=20, help="dimensions of z")
    parser.add_argument("--hidden-dim", type=count, default=400, help="units of a hidden layer")
    parser.add_argument("--epochs", type=count, default=14, help="passes over the data")
    parser.add_argument("--batch-size", type=count, default=128, help="images of a step, of all processes")
    parser.add_argument("--lr", type=learning_rate, default=3e-3, help="the peak of its one-cycle schedule")
    parser.add_argument("--compiled", action="store_true", help="compile the steps: seconds, then faster")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    run(main, parser, num_samples=100, out="runs/distributed")
