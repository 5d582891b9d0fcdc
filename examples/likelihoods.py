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
from command_line import Parser, count, run, several
from results import machine, save_pictures, write_summary

D = 784  # pixels
# name: (p(x | z), how a pixel becomes x, the number of levels whose mass it bounds)
LIKELIHOODS = {
    "Gaussian, mean of squares": (pv.Gaussian(math.sqrt(D / 2)), pv.data.UniformDequantisation(), 256),
    "Gaussian, sigma 0.1": (pv.Gaussian(0.1), pv.data.UniformDequantisation(), 256),
    "Gaussian, learned sigma": (pv.Gaussian(pv.LearnedSigma()), pv.data.UniformDequantisation(), 256),
    "Gaussian, sigma by pixel": (pv.Gaussian(pv.PixelSigma()), pv.data.UniformDequantisation(), 256),
    "continuous Bernoulli": (pv.ContinuousBernoulli(), pv.data.UniformDequantisation(), 256),
    "discretised logistic, 256": (pv.DiscretizedLogistic(256), pv.data.GreyLevels(256), 256),
    "discretised logistic, 8": (pv.DiscretizedLogistic(8), pv.data.GreyLevels(8), 8),
    "categorical, 8": (pv.Categorical(8), pv.data.GreyLevels(8), 8),
    "Bernoulli": (pv.Bernoulli(), pv.data.DynamicBinarisation(), 2),
}


def main(options: argparse.Namespace) -> None:
    """Train one after the other; write a row of numbers and draw a row of images for each."""
    rows, strips = [], {}
    for name in LIKELIHOODS:
        torch.manual_seed(options.seed)
        row, strips[name] = train(name, options)
        rows.append(row)
        print("   ".join(f"{key} {value}" for key, value in row.items()))
    about = {"dataset": "mnist", "unit": "nats per data point", "machine": machine(options.device)}
    save_pictures(options.out, {"likelihoods": draw(strips)})
    write_summary(options, about | {"rows": rows})


def train(name: str, options: argparse.Namespace) -> tuple[dict[str, str | float], list[Tensor]]:
    """Return the numbers of a likelihood, and test images, reconstructions, new means and new draws."""
    start = time.perf_counter()
    family, protocol, levels = LIKELIHOODS[name]
    batches = pv.data.Batches(pv.data.load(train=True), protocol, batch_size=128, device=options.device)
    x_test = pv.data.observe(pv.data.load(train=False), protocol)[: options.images].to(options.device)

    latent, hidden = options.latent_dim, options.hidden_dim
    decoder = nn.Sequential(pv.MLP(latent, hidden, family.num_features(D)), family)  # p(x | z)
    encoder = nn.Sequential(pv.MLP(D, hidden, 2 * latent), pv.DiagNormal())  # q(z | x)
    model, guide = pv.Model(pv.StandardNormal(latent), decoder), pv.Guide(encoder)
    model, guide = model.to(options.device), guide.to(options.device)

    optimizer = torch.optim.Adam(pv.parameters(model, guide), lr=2e-3, fused=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, options.epochs * len(batches))
    svi = pv.SVI(model, guide, optimizer, loss=TraceMeanField_ELBO())
    for epoch in pv.fit(svi, batches, options.epochs, scheduler=scheduler):
        print(f"{name}: {epoch}")

    terms = pv.elbo_terms(model, guide, x_test)
    log_p = pv.log_evidence(model, guide, x_test, options.num_samples).mean().item()
    z = pv.latent_terms(model, guide, x_test[:1000], num_samples=50)["z"]
    is_density = isinstance(protocol, pv.data.UniformDequantisation)
    # With uniform noise u, log P(pixel) >= E_u[log p(x)] - D log 256 (Theis et al. 2016).
    log_mass = log_p - D * math.log(256) if is_density else log_p
    row: dict[str, str | float] = {
        "likelihood": name,
        "protocol": str(protocol),
        "log of a": "density" if is_density else "mass",
        "reconstruction": round(terms.reconstruction.mean().item(), 2),
        "KL": round(terms.kl.mean().item(), 2),
        "active dimensions": int(z.active.sum()),
        "ELBO": round(terms.elbo.mean().item(), 2),
        "log p(x) >=": round(log_p, 2),
        "levels": levels,
        "bits per dimension": round(-log_mass / (D * math.log(2)), 3),
        "seconds": round(time.perf_counter() - start),
    }
    new = pv.generate(model, x_test[:6])["x"]
    return row, [x_test[:6], pv.reconstruct(model, guide, x_test[:6])["x"].mean, new.mean, new.sample()]


def draw(strips: dict[str, list[Tensor]]) -> Figure:
    """Draw a row for each likelihood, six images in each of its four strips."""
    titles = ["test images x", "E[x | z], z ~ q(z | x)", "E[x | z], z ~ p(z)", "x ~ p(x | z), z ~ p(z)"]
    figure = Figure(figsize=(12, 0.46 * len(strips) + 0.4), layout="constrained")
    axes = figure.subplots(len(strips), 4)
    for column, title in enumerate(titles):
        axes[0, column].set_title(title, fontsize=10)
    for (name, row), panels in zip(strips.items(), axes, strict=True):
        panels[0].set_ylabel(name, rotation=0, ha="right", va="center")
        for x, panel in zip(row, panels, strict=True):
            strip = torch.cat([*x.detach().cpu().view(-1, 28, 28)], 1).clamp(0, 1)
            panel.imshow(strip.tolist(), cmap="gray", vmin=0, vmax=1)
            panel.set(xticks=[], yticks=[])
            panel.spines[:].set_visible(False)
    return figure


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("--latent-dim", type=count, default=20, help="dimensions of z")
    parser.add_argument("--hidden-dim", type=count, default=400, help="units of a hidden layer")
    parser.add_argument("--epochs", type=count, default=10, help="passes over the data")
    parser.add_argument("--images", type=several, default=2000, help="test images to evaluate")
    run(main, parser, num_samples=100, out="runs/likelihoods")
