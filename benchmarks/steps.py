"""Milliseconds a training step, of every contender on the same work, in one interleaved run.

    pip install -e ".[bench]"
    python benchmarks/steps.py --out docs/results/steps.json

The work: a VAE 784-400-20 with a Bernoulli likelihood, Adam at 1e-3, one batch of binary images that
stays in memory, float32. The contenders take turns, round after round, so that a slow moment of the
machine falls on all of them; what is told is the median over rounds, and the median of the ratios
within a round. The process is pinned to as many cores as it has threads.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import torch
import torch.nn.functional as F
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.optim import PyroOptim
from torch import Tensor, nn
from tqdm import tqdm

import pyro_vae as pv

WIDTH, HIDDEN, LATENT = 784, 400, 20
Run = Callable[[int], None]  # so many steps


def networks() -> tuple[nn.Module, nn.Module]:
    """Return the encoder's and the decoder's network, from the same seed for everybody."""
    torch.manual_seed(0)
    return pv.MLP(WIDTH, HIDDEN, 2 * LATENT), pv.MLP(LATENT, HIDDEN, WIDTH)


def products(x: Tensor) -> Run:
    """Nothing but the matrix products of a step, forward and backward."""
    shapes = [(WIDTH, HIDDEN), (HIDDEN, 2 * LATENT), (LATENT, HIDDEN), (HIDDEN, WIDTH)]
    layers = [(torch.randn(len(x), i), torch.randn(i, o), torch.randn(len(x), o)) for i, o in shapes]

    def run(steps: int) -> None:
        for _ in range(steps):
            for number, (h, w, g) in enumerate(layers):
                _ = h @ w
                _ = h.T @ g
                if number:  # nobody asks for the gradient of the images
                    _ = g @ w.T

    return run


def pytorch(x: Tensor, *, compiled: bool) -> Run:
    """The VAE written out in PyTorch, with the closed-form KL and fused Adam."""
    encoder, decoder = networks()
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-3, fused=True)

    def loss(x: Tensor) -> Tensor:
        mean, log_sigma = encoder(x).chunk(2, -1)
        z = mean + log_sigma.exp() * torch.randn_like(mean)
        cross_entropy = F.binary_cross_entropy_with_logits(decoder(z), x, reduction="sum")
        return cross_entropy + 0.5 * ((2 * log_sigma).exp() + mean**2 - 1 - 2 * log_sigma).sum()

    objective: Any = torch.compile(loss) if compiled else loss

    def run(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            value = objective(x)
            value.backward()
            optimizer.step()
            value.detach().item()

    return run


def svi(x: Tensor, svi_class: Any, elbo: Any) -> Run:
    """The pair of this package under an SVI and an ELBO, each with a parameter store of its own."""
    encoder, decoder = networks()
    model = pv.Model(pv.StandardNormal(LATENT), nn.Sequential(decoder, pv.Bernoulli()))
    guide = pv.Guide(nn.Sequential(encoder, pv.DiagNormal()))
    optim = PyroOptim(torch.optim.Adam, {"lr": 1e-3})
    step = svi_class(model, guide, optim, loss=elbo).step
    state: Any = None

    def run(steps: int) -> None:
        nonlocal state
        with pyro.get_param_store().scope(state) as state:
            for _ in range(steps):
                step(x)

    return run


def numpyro(x: Tensor) -> Run:
    """The same VAE in NumPyro: SVI's update jitted, many of them in one loop on the device."""
    import jax
    import jax.numpy as jnp
    import numpyro as npr
    import numpyro.distributions as ndist
    from numpyro import infer as ninfer

    def linear(name: str, h: Any, size_in: int, size_out: int) -> Any:
        uniform = ndist.Uniform(-(size_in**-0.5), size_in**-0.5)
        w = npr.param(f"{name}_w", lambda key: uniform.sample(key, (size_in, size_out)))
        b = npr.param(f"{name}_b", lambda key: uniform.sample(key, (size_out,)))
        return h @ w + b

    def model(x: Any) -> None:
        with npr.plate("data", len(x)):
            z = npr.sample("z", ndist.Normal(jnp.zeros(LATENT), 1).to_event(1))
            h = jax.nn.relu(linear("decoder_1", z, LATENT, HIDDEN))
            logits = linear("decoder_2", h, HIDDEN, WIDTH)
            npr.sample("x", ndist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(x: Any) -> None:
        h = jax.nn.relu(linear("encoder_1", x, WIDTH, HIDDEN))
        mean, log_sigma = jnp.split(linear("encoder_2", h, HIDDEN, 2 * LATENT), 2, -1)
        with npr.plate("data", len(x)):
            npr.sample("z", ndist.Normal(mean, jnp.exp(log_sigma)).to_event(1))

    inference = ninfer.SVI(model, guide, npr.optim.Adam(1e-3), ninfer.Trace_ELBO())
    images = jnp.asarray(x.numpy())
    state = inference.init(jax.random.PRNGKey(0), images)

    @jax.jit
    def loop(state: Any, steps: int) -> Any:
        return jax.lax.fori_loop(0, steps, lambda _, state: inference.update(state, images)[0], state)

    def run(steps: int) -> None:
        nonlocal state
        state = jax.block_until_ready(loop(state, steps))

    return run


def reduced(run: Run) -> Run:
    """The same, with reduced precision allowed inside float32 matrix products."""

    def run_reduced(steps: int) -> None:
        torch.set_float32_matmul_precision("medium")
        try:
            run(steps)
        finally:
            torch.set_float32_matmul_precision("highest")

    return run_reduced


def compiled(x: Tensor, elbo: Any) -> Run:
    """This package's SVI on a compiled ELBO."""
    return svi(x, pv.SVI, pv.CompiledELBO(elbo))


CONTENDERS: dict[str, Callable[[Tensor], Run]] = {
    "matrix products alone": products,
    "matrix products alone, reduced": lambda x: reduced(products(x)),
    "PyTorch": lambda x: pytorch(x, compiled=False),
    "PyTorch, torch.compile": lambda x: pytorch(x, compiled=True),
    "pyro.infer.SVI, Trace_ELBO": lambda x: svi(x, pyro.infer.SVI, Trace_ELBO()),
    "pyro.infer.SVI, TraceMeanField_ELBO": lambda x: svi(x, pyro.infer.SVI, TraceMeanField_ELBO()),
    "pyro_vae, Trace_ELBO": lambda x: svi(x, pv.SVI, Trace_ELBO()),
    "pyro_vae, TraceMeanField_ELBO": lambda x: svi(x, pv.SVI, TraceMeanField_ELBO()),
    "pyro_vae, compiled Trace_ELBO": lambda x: compiled(x, Trace_ELBO()),
    "pyro_vae, compiled TraceMeanField_ELBO": lambda x: compiled(x, TraceMeanField_ELBO()),
    "pyro_vae, compiled TraceMeanField_ELBO, reduced": lambda x: reduced(compiled(x, TraceMeanField_ELBO())),
    "NumPyro, jitted loop": numpyro,
}


YARDSTICKS = {
    "PyTorch": "PyTorch",
    "products": "matrix products alone",
    "NumPyro": "NumPyro, jitted loop",
}


def main(options: argparse.Namespace) -> None:
    """Time all contenders at every batch size and write the record."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    rows = []
    for size in options.batch_size:
        x = torch.rand(size, WIDTH).round()
        runs: dict[str, Run] = {}
        for name, make in tqdm(CONTENDERS.items(), desc=f"batch {size}, first steps"):
            runs[name] = make(x)
            runs[name](options.steps)  # compiled and warm
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in tqdm(range(options.rounds), desc=f"batch {size}, rounds"):
            for name, run in runs.items():
                start = time.perf_counter()
                run(options.steps)
                times[name].append(1e3 * (time.perf_counter() - start) / options.steps)
        for name, each in times.items():
            row: dict[str, Any] = {"batch": size, "contender": name}
            row["ms"] = round(statistics.median(each), 3)
            row["images/s"] = round(1e3 * size / statistics.median(each))
            for short, other in YARDSTICKS.items():
                ratios = [mine / its for mine, its in zip(each, times[other], strict=True)]
                row[f"x {short}"] = round(statistics.median(ratios), 3)
            rows.append(row)
            print(f"{size:5d}  {name:50s} {row['ms']:8.3f} ms  {row['x PyTorch']:5.2f} x PyTorch")
    record = {
        "command": " ".join(["python benchmarks/steps.py", *sys.argv[1:]]),
        "work": f"VAE {WIDTH}-{HIDDEN}-{LATENT}, Bernoulli likelihood, Adam, float32, a batch in memory",
        "threads": options.threads,
        "rounds": options.rounds,
        "steps_a_round": options.steps,
        "processor": _processor(),
        "torch": torch.__version__,
        "rows": rows,
    }
    options.out.write_text(json.dumps(record, indent=2) + "\n")


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Time a training step of every contender.")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[128, 256, 1024])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=20, help="steps a round")
    parser.add_argument("--out", type=Path, default=Path("steps.json"))
    main(parser.parse_args())
