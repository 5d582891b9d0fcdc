"""Swap the likelihood: one VAE under nine of them, side by side on MNIST.

    python examples/likelihoods.py

Encoder, decoder, prior and objective stay. Only p(x | z) changes, and with it
the loss and what its number means.
"""

import argparse
import math
import time

import torch
from matplotlib.figure import Figure
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor, nn

import pyro_vae as pv
from command_line import Parser, count, run
from results import machine, save_pictures, write_summary

D = 784  # pixels
BY_PIXEL = pv.PixelSigma(bounds=(-8.0, 0.0))  # of log sigma; the standard deviation within a bin is e^-6.8
# name: (p(x | z), how a pixel becomes x, the number of levels K of which it is a mass, where there are some)
LIKELIHOODS = {
    "Gaussian, mean of squares": (pv.Gaussian(math.sqrt(D / 2)), pv.data.UniformDequantisation(), 256),
    "Gaussian, sigma 0.1": (pv.Gaussian(0.1), pv.data.UniformDequantisation(), 256),
    "Gaussian, learned sigma": (pv.Gaussian(pv.LearnedSigma()), pv.data.UniformDequantisation(), 256),
    "Gaussian, sigma by pixel": (pv.Gaussian(BY_PIXEL), pv.data.UniformDequantisation(), 256),
    "continuous Bernoulli": (pv.ContinuousBernoulli(), pv.data.UniformDequantisation(), 256),
    "discretised logistic, 256": (pv.DiscretizedLogistic(256), pv.data.GreyLevels(256), 256),
    "discretised logistic, 8": (pv.DiscretizedLogistic(8), pv.data.GreyLevels(8), 8),
    "categorical, 8": (pv.Categorical(8), pv.data.GreyLevels(8), 8),
    "Bernoulli": (pv.Bernoulli(), pv.data.DynamicBinarisation(), 2),
}


def main(options: argparse.Namespace) -> None:
    """Train one after the other; write a row and draw two strips of images for each."""
    grey = pv.data.observe(pv.data.load(train=False), pv.data.Grey())
    rows = []
    strips: dict[str, tuple[Tensor, Tensor | None]] = {"the test images": (grey[:10], None)}
    for name in LIKELIHOODS:
        torch.manual_seed(options.seed)
        row, reconstructed, generated = train(name, options)
        rows.append(row)
        strips[name] = (reconstructed, generated)
        print("   ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    about = {"dataset": "mnist", "unit": "nats per data point", "machine": machine(options.device)}
    save_pictures(options.out, {"likelihoods": draw(strips)})
    write_summary(options, about | {"rows": rows})


def train(name: str, options: argparse.Namespace) -> tuple[dict[str, str | float], Tensor, Tensor]:
    """Return the numbers of a likelihood, ten reconstructions and ten new images."""
    start = time.perf_counter()
    family, protocol, levels = LIKELIHOODS[name]
    batches = pv.data.Batches(pv.data.load(train=True), protocol, batch_size=128, device=options.device)
    x_test = pv.data.observe(pv.data.load(train=False), protocol).to(options.device)

    latent, hidden = options.latent_dim, options.hidden_dim
    decoder = nn.Sequential(pv.MLP(latent, hidden, family.num_features(D)), family)  # p(x | z)
    encoder = nn.Sequential(pv.MLP(D, hidden, 2 * latent), pv.DiagNormal())  # q(z | x)
    model, guide = pv.Model(pv.StandardNormal(latent), decoder), pv.Guide(encoder)
    model, guide = model.to(options.device), guide.to(options.device)

    optimizer = torch.optim.Adam(pv.parameters(model, guide), lr=2e-3, fused=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, options.epochs * len(batches))
    svi = pv.SVI(model, guide, optimizer, loss=TraceMeanField_ELBO())
    for epoch in pv.fit(svi, batches, options.epochs, scheduler=scheduler):
        print(f"{name}: {epoch}", flush=True)

    terms = pv.elbo_terms(model, guide, x_test)
    log_p = pv.log_evidence(model, guide, x_test[: options.images], options.num_samples).mean().item()
    is_density = isinstance(protocol, pv.data.UniformDequantisation)
    log_mass = log_p - D * math.log(256) if is_density else log_p  # of a density: at least
    row: dict[str, str | float] = {
        "likelihood": name,
        "protocol": str(protocol),
        "log of a": "density" if is_density else "mass",
        "reconstruction": round(terms.reconstruction.mean().item(), 2),
        "KL": round(terms.kl.mean().item(), 2),
        "ELBO": round(terms.elbo.mean().item(), 2),
        "log p(x) >=": round(log_p, 2),
        "levels": levels,
        "bits per dimension": round(-log_mass / (D * math.log(2)), 3),
        "seconds": round(time.perf_counter() - start),
    }
    return row, pv.reconstruct(model, guide, x_test[:10])["x"].mean, pv.generate(model, x_test[:10])["x"].mean


def draw(strips: dict[str, tuple[Tensor, Tensor | None]]) -> Figure:
    """Draw a row for each likelihood: reconstructions on the left, new images on the right."""
    figure = Figure(figsize=(12, 0.55 * len(strips) + 0.3), layout="constrained")
    axes = figure.subplots(len(strips), 2)
    for (name, pair), row in zip(strips.items(), axes, strict=True):
        row[0].set_ylabel(name, rotation=0, ha="right", va="center")
        for x, panel in zip(pair, row, strict=True):
            panel.set(xticks=[], yticks=[])
            panel.spines[:].set_visible(False)
            if x is not None:
                strip = torch.cat([*x.detach().cpu().view(-1, 28, 28)], 1).clamp(0, 1)
                panel.imshow(strip.tolist(), cmap="gray", vmin=0, vmax=1)
    axes[0, 0].set_title("reconstructions, E[x | z]")
    axes[0, 1].set_title("new images, E[x | z] with z from the prior")
    return figure


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("--latent-dim", type=count, default=20, help="dimensions of z")
    parser.add_argument("--hidden-dim", type=count, default=400, help="units of a hidden layer")
    parser.add_argument("--epochs", type=count, default=10, help="passes over the data")
    parser.add_argument("--images", type=count, default=1000, help="test images for log p(x)")
    run(main, parser, num_samples=100, out="runs/likelihoods")
