"""An autoencoder and a VAE with the same networks: codes and new images.

    python examples/autoencoder.py

Both reconstruct. Only the VAE says where its latents lie, and so can draw new
images.
"""

import argparse
from statistics import fmean, stdev

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

import pyro_vae as pv
from autoencoder_models import Trained, adam, autoencoder, step, vae
from command_line import Parser, count, run, several
from results import machine, save_pictures, write_summary

PROTOCOL = pv.data.DynamicBinarisation()
METHODS = {"autoencoder": autoencoder, "VAE": vae}


def classifier(x: Tensor, labels: Tensor, epochs: int) -> nn.Module:
    """Return the 32 features from which a classifier of digits reads the label."""
    features = pv.MLP(784, 256, 32).to(x.device)
    head = nn.Sequential(nn.ReLU(), nn.Linear(32, 10)).to(x.device)
    scheduler = adam((features, head), epochs * -(-len(x) // 128))
    for _ in range(epochs):
        for rows in torch.randperm(len(x), device=x.device).split(128):
            step(scheduler, F.cross_entropy(head(features(x[rows])), labels[rows]))
    return features


def frechet(a: Tensor, b: Tensor) -> float:
    """Return the Frechet distance of two Gaussians fitted to features (N, d) (arXiv 1706.08500)."""
    a, b = a.double(), b.double()
    first, second = (torch.atleast_2d(each.T.cov()) for each in (a, b))
    values, vectors = torch.linalg.eigh(first)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()
    spread = a.var(0).sum() + b.var(0).sum() - 2 * cross
    return ((a.mean(0) - b.mean(0)).square().sum() + spread).item()


def new_codes(trained: Trained, x_train: Tensor, n: int) -> dict[str, Tensor]:
    """Return n codes from N(0, I), and n from a Gaussian fitted to the codes of training images."""
    codes = trained.encode(x_train)
    identity = torch.eye(codes.shape[1], device=codes.device)
    fitted = MultivariateNormal(codes.mean(0), codes.T.cov() + 1e-6 * identity)
    return {"N(0, I)": torch.randn(n, codes.shape[1], device=codes.device), "fitted": fitted.sample((n,))}


@torch.no_grad()
def measure(trained: Trained, x_train: Tensor, features: nn.Module, real: Tensor) -> dict[str, float]:
    """Return the reconstruction, the distance of new images from real ones, and log p(x)."""
    row = {"reconstruction": trained.reconstruction}
    for name, z in new_codes(trained, x_train, len(real)).items():
        row[f"distance, z ~ {name}"] = frechet(features(trained.decode(z).bernoulli()), real)
    return row if trained.log_p is None else row | {"log p(x) >=": trained.log_p}


@torch.no_grad()
def draw_planes(both: dict[str, Trained], x: Tensor, labels: Tensor) -> Figure:
    """Draw the codes of images in the plane, over the circles of N(0, I)."""
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    panels = figure.subplots(1, len(both))
    for (name, trained), axes in zip(both.items(), panels, strict=True):
        across, up = trained.encode(x).cpu().T.tolist()
        points = axes.scatter(across, up, c=labels, cmap="tab10", vmin=-0.5, vmax=9.5, s=3, lw=0)
        for radius in (1, 2):
            axes.add_patch(Circle((0, 0), radius, fill=False, color="black", lw=1.2))
        axes.set(aspect="equal", title=f"{name}: codes of test images", xlabel="$z_1$", ylabel="$z_2$")
    figure.colorbar(points, ax=panels, ticks=range(10), label="digit")
    return figure


@torch.no_grad()
def draw_images(both: dict[str, Trained], x_train: Tensor, x: Tensor) -> Figure:
    """Draw new images, and images on straight lines between the codes of two test images."""
    strips = {}
    for name, trained in both.items():
        for source, z in new_codes(trained, x_train, 15).items():
            strips[f"{name}, z ~ {source}"] = trained.decode(z)
    for name, trained in both.items():
        start, end = trained.encode(x[:2])
        strips[f"{name}, interpolated"] = trained.decode(
            torch.lerp(start, end, torch.linspace(0, 1, 15)[:, None])
        )
    figure = Figure(figsize=(10, 0.7 * len(strips)), layout="constrained")
    rows: list[Axes] = list(figure.subplots(len(strips)))
    for (name, strip), axes in zip(strips.items(), rows, strict=True):
        axes.imshow(torch.cat([*strip.cpu().view(-1, 28, 28)], 1).tolist(), cmap="gray", vmin=0, vmax=1)
        axes.set_ylabel(name, rotation=0, ha="right", va="center")
        axes.set(xticks=[], yticks=[])
    return figure


def main(options: argparse.Namespace) -> None:
    """Train both with each number of latents and each seed; measure and draw."""
    train, test = pv.data.load(train=True), pv.data.load(train=False)
    batches = pv.data.Batches(train, PROTOCOL, batch_size=128, device=options.device)
    x_train, x_test = (pv.data.observe(images, PROTOCOL).to(options.device) for images in (train, test))
    features = classifier(x_train, train.labels.to(options.device), epochs=5)
    with torch.no_grad():
        real, others = features(x_test), features(x_train[: len(x_test)])
    rows: list[dict[str, float | str]] = [{"model": "training images", "distance": frechet(others, real)}]
    first: dict[int, dict[str, Trained]] = {latent: {} for latent in options.latent_dims}  # of the first seed
    for latent in options.latent_dims:
        for name, method in METHODS.items():
            found: list[dict[str, float]] = []
            for seed in range(options.seeds):
                torch.manual_seed(options.seed + seed)
                trained = method(latent, batches, x_test, options)
                first[latent].setdefault(name, trained)
                found.append(measure(trained, x_train, features, real))
            row: dict[str, float | str] = {"model": name, "latents": latent}
            for number in found[0]:
                values = [each[number] for each in found]
                row |= {number: fmean(values), f"{number}, error": stdev(values) / len(values) ** 0.5}
            rows.append(row)
            print("   ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    pictures = {"images": draw_images(first[options.latent_dims[-1]], x_train, x_test)}
    if 2 in first:
        pictures["codes"] = draw_planes(first[2], x_test, test.labels)
    save_pictures(options.out, pictures)
    about = {"dataset": "mnist", "protocol": str(PROTOCOL), "unit": "nats per data point, log mass"}
    write_summary(options, about | {"machine": machine(options.device), "rows": rows})


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("--latent-dims", type=count, nargs="+", default=[2, 16], help="dimensions of z")
    parser.add_argument("--hidden-dim", type=count, default=400, help="units of the hidden layer")
    parser.add_argument("--epochs", type=count, default=10, help="passes over the data")
    parser.add_argument("--seeds", type=several, default=3, help="seeds, from --seed on")
    parser.add_argument("--images", type=count, default=1000, help="test images for log p(x)")
    run(main, parser, num_samples=100, out="runs/autoencoder")
