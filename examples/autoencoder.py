"""Train the same networks as an autoencoder and as a VAE on MNIST.

    python examples/autoencoder.py

The autoencoder minimises -log p(x | z) at its code z = mu(x): a binary
cross-entropy. The VAE minimises the negative ELBO. A classifier judges the
new images.
"""

import argparse
from itertools import product
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor, nn
from torchvision.utils import make_grid

import pyro_vae as pv
from command_line import Parser, count, run, several
from judge import judge, train_classifier
from results import machine, save_pictures, write_summary

SIZES = (2, 20)  # dimensions of z: a plane to look at, and enough to reconstruct well
Pair = tuple[pv.Model, pv.Guide]


def train(name: str, latent: int, batches: pv.data.Batches, options: argparse.Namespace) -> Pair:
    """Return z ~ N(0, I), x ~ p(x | z) and q(z | x) = N(mu, diag sigma^2), trained by the named loss."""
    hidden = options.hidden_dim
    decoder = nn.Sequential(pv.MLP(latent, hidden, hidden, 784, activation=nn.SiLU), pv.Bernoulli())
    encoder = nn.Sequential(pv.MLP(784, hidden, hidden, 2 * latent, activation=nn.SiLU), pv.DiagNormal())
    model = pv.Model(pv.StandardNormal(latent), decoder).to(options.device)
    guide = pv.Guide(encoder).to(options.device)
    optimizer = torch.optim.Adam(pv.parameters(model, guide), lr=3e-3, fused=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, options.epochs * len(batches))
    if name == "VAE":  # -E_q[log p(x | z)] + KL(q(z | x) || p(z))
        svi = pv.SVI(model, guide, optimizer, loss=TraceMeanField_ELBO())
        for epoch in pv.fit(svi, batches, options.epochs, scheduler=scheduler):
            print(epoch)
        return model, guide
    for _ in range(options.epochs):
        for x in batches:
            z = encoder(x).mean  # the code: neither sigma nor p(z) has a part
            loss = -decoder(z).log_prob(x).mean()  # binary cross-entropy
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
    return model, guide


def draw_fitted(codes: Tensor, n: int) -> Tensor:
    """Draw n times from the Gaussian with the mean and the covariance of the codes."""
    _, s, v = torch.linalg.svd(codes - codes.mean(0), full_matrices=False)  # covariance v^T s^2 v / (N - 1)
    return codes.mean(0) + torch.randn(n, len(s), device=codes.device) * s / (len(codes) - 1) ** 0.5 @ v


def draw_images(panels: dict[str, Tensor], rows: int, columns: int) -> Figure:
    """Draw rows of panels: a mosaic of images, so many side by side, under each title."""
    figure = Figure(figsize=(11, 3.8 * rows), layout="constrained")
    every_axes = figure.subplots(rows, len(panels) // rows).flat
    for axes, (title, x) in zip(every_axes, panels.items(), strict=True):
        mosaic = make_grid(x.cpu().reshape(-1, 1, 28, 28), columns, padding=1, pad_value=1)
        axes.imshow(mosaic[0].tolist(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(title)
        axes.axis("off")
    return figure


def draw_planes(codes: dict[str, Tensor], labels: Tensor) -> Figure:
    """Draw codes in the plane, coloured by digit, and the circle that holds 95% of N(0, I)."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    for axes, (title, z) in zip(figure.subplots(1, 2), codes.items(), strict=True):
        dots = axes.scatter(*z.T.tolist(), c=labels.tolist(), cmap="tab10", s=3, vmin=-0.5, vmax=9.5)
        axes.add_patch(Circle((0, 0), 2.45, fill=False, lw=2))
        axes.set(title=f"{title}: codes of test images", xlabel="$z_1$", ylabel="$z_2$")
        axes.set_aspect("equal", adjustable="datalim")
    figure.colorbar(dots, ticks=range(10), label="digit")
    return figure


@torch.no_grad()
def codes(guide: pv.Guide, x_train: Tensor, x: Tensor) -> dict[str, Tensor]:
    """Return z from three sources, each as many as there are images x."""
    fitted = draw_fitted(guide.encoder(x_train).mean, len(x))
    z = guide.encoder(x).mean
    return {"z from N(0, I)": torch.randn_like(z), "z from a fitted Gaussian": fitted, "z of test images": z}


def main(options: argparse.Namespace) -> None:
    """Train with each seed and size, measure and draw."""
    protocol, device = pv.data.DynamicBinarisation(), options.device
    train_set, test_set = pv.data.load(train=True), pv.data.load(train=False)
    batches = pv.data.Batches(train_set, protocol, batch_size=128, device=device)
    x_train, x_test = (pv.data.observe(images, protocol).to(device) for images in (train_set, test_set))
    grey = pv.data.observe(train_set, pv.data.Grey()).to(device)
    classifier = train_classifier(grey, train_set.labels.to(device))
    right = (classifier(x_test).argmax(-1).cpu() == test_set.labels).double().mean().item()

    rows: list[dict[str, Any]] = []
    planes, samples, paths = (dict[str, Tensor]() for _ in range(3))
    for seed, latent in product(range(options.seed, options.seed + options.seeds), SIZES):
        torch.manual_seed(seed)
        real, others = x_test[torch.randperm(len(x_test))].chunk(2)
        numbers = {"real": judge(classifier, others, real)}
        for name in ("autoencoder", "VAE"):
            torch.manual_seed(seed)  # both start with the same weights
            model, guide = train(name, latent, batches, options)
            with torch.no_grad():
                for source, z in codes(guide, x_train, others).items():
                    p = model.decoder(z)  # p(x | z)
                    numbers[f"{name}, {source}"] = judge(classifier, p.sample(), real)
                    samples[f"{name}, {source}"] = p.mean[:36]  # those of the last seed and size are drawn
                z = guide.encoder(x_test).mean
                paths[name] = model.decoder(pv.plots.latent_paths(z[:6], z[6:12], steps=9)).mean
                planes.setdefault(name, z[:4000])  # of the first seed and size
                spread, log_p = z.var(0).mean().sqrt(), model.decoder(z).log_prob(x_test).mean()
            numbers[name] = {"reconstruction": log_p.item(), "spread": spread.item()}
        elbo, _, kl = (term.mean().item() for term in pv.elbo_terms(model, guide, x_test))  # of the VAE
        evidence = pv.log_evidence(model, guide, x_test[: options.images], options.num_samples).mean().item()
        numbers["VAE"] |= {"elbo": elbo, "kl": kl, "log_evidence": evidence}
        rows += [{"latent_dim": latent, "seed": seed, "of": of} | each for of, each in numbers.items()]
        for of, each in numbers.items():
            print(f"{latent} dimensions, {of}:", ", ".join(f"{k} {v:.2f}" for k, v in each.items()))

    about = {"dataset": "mnist", "protocol": str(protocol), "unit": "nats per data point, log mass"}
    write_summary(options, about | {"accuracy": right, "machine": machine(device), "rows": rows})
    mosaics = {
        "samples": draw_images(samples, rows=2, columns=6),
        "interpolations": draw_images(paths, rows=1, columns=9),
    }
    save_pictures(options.out, {"planes": draw_planes(planes, test_set.labels[:4000]), **mosaics})


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("--hidden-dim", type=count, default=200, help="units of a hidden layer")
    parser.add_argument("--epochs", type=count, default=8, help="passes over the data")
    parser.add_argument("--seeds", type=count, default=3, help="seeds, from --seed on")
    parser.add_argument("--images", type=several, default=1000, help="test images for log p(x)")
    run(main, parser, num_samples=100, out="runs/autoencoder")
