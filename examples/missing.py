"""Train a VAE on MNIST with missing pixels; complete halves of test images.

    python examples/missing.py --share 0.5

Each training image lacks a random share of its pixels, the same ones in every
epoch. Model and guide are those of the plain VAE inside pv.mask_missing: the
bound is that of MIWAE.
"""

import argparse
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import pyro_vae as pv
from command_line import Parser, count, run, several, share
from results import save_pictures, save_weights, write_summary

MISSING = 2  # a pixel is stored as 0, 1 or this
BINARY = pv.data.StaticBinarisation()


@dataclass(frozen=True)
class SomeMissing(pv.data.PixelProtocol):
    """Binary pixels, of which a random share is missing, drawn once for the data set: NaN."""

    share: float

    def _store(self, pixels: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        missing = torch.rand(pixels.shape, generator=generator) < self.share
        return BINARY.store(pixels).masked_fill(missing.to(pixels.device), MISSING)

    def _read(self, stored: Tensor, generator: torch.Generator | None) -> Tensor:
        return BINARY.read(stored).masked_fill(stored == MISSING, math.nan)

    def __str__(self) -> str:
        return f"{BINARY}, {self.share:.0%} of the pixels missing"


def completions(model: nn.Module, guide: nn.Module, x: Tensor, num_samples: int) -> Tensor:
    """Return rows of images: x, grey where missing, E[x_m | x_o], and three draws of p(x_m | x_o)."""
    mean = pv.impute(model, guide, x, num_samples)["x"].mean
    draws = [pv.impute(model, guide, x, num_samples)["x"].draw for _ in range(3)]
    return torch.cat([x.nan_to_num(0.5), mean, *draws])


def main(options: argparse.Namespace) -> None:
    """Train, evaluate and draw."""
    protocol, device, num_samples = SomeMissing(options.share), options.device, options.num_samples
    batches = pv.data.Batches(pv.data.load(train=True), protocol, batch_size=128, device=device)
    x_test = pv.data.observe(pv.data.load(train=False), BINARY)[: options.images].to(device)

    # Model: z ~ N(0, I), x ~ p(x | z). Guide: q(z | x) = N(mu, diag sigma^2).
    latent, hidden = options.latent_dim, options.hidden_dim
    decoder = nn.Sequential(pv.MLP(latent, hidden, hidden, 784, activation=nn.SiLU), pv.Bernoulli())
    encoder = nn.Sequential(pv.MLP(784, hidden, hidden, 2 * latent, activation=nn.SiLU), pv.DiagNormal())
    model = pv.Model(pv.StandardNormal(latent), decoder).to(device)
    guide = pv.Guide(encoder).to(device)

    optimizer = torch.optim.Adam(pv.parameters(model, guide), lr=2e-3, fused=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, options.epochs * len(batches))
    svi = pv.SVI(*pv.mask_missing(model, guide), optimizer, loss=pv.IWAE(options.particles))
    for epoch in pv.fit(svi, batches, options.epochs, watch=x_test[:1000], scheduler=scheduler):
        print(epoch)

    upper = torch.arange(784, device=device).expand_as(x_test) < 392
    whole = pv.log_evidence(model, guide, x_test, num_samples)
    lower = pv.conditional_evidence(model, guide, x_test, upper, num_samples).values
    error = float(lower.std()) / math.sqrt(len(lower))
    print(
        f"-log p(lower half | upper half) = {-lower.mean():.2f} ± {error:.2f} nats per data point, -log p(x) "
        f"at most {-whole.mean():.2f}: mnist test, {BINARY}, {len(x_test)} images, their standard error, "
        f"{num_samples} importance samples; trained with {options.share:.0%} of the pixels missing, "
        f"seed {options.seed}"
    )

    half = x_test[:10].masked_fill(~upper[:10], math.nan)
    rows = torch.cat([completions(model, guide, half, num_samples), x_test[:10]])
    title = "upper half, E[lower | upper], three draws of it, truth"
    save_weights(options.out, model, guide)
    save_pictures(options.out, {"completions": pv.plots.images(rows, title=title)})
    numbers = {
        "dataset": "mnist",
        "likelihood": "bernoulli",
        "protocol": str(protocol),
        "test_protocol": str(BINARY),
        "unit": "nats per data point, log mass",
        "log_p_lower_given_upper": float(lower.mean()),
        "standard_error": error,
        "log_p_x_at_least": float(whole.mean()),
    }
    write_summary(options, numbers)


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("--share", type=share, default=0.5, help="of the training pixels that is missing")
    parser.add_argument("--particles", type=count, default=5, help="K of the bound by importance weights")
    parser.add_argument("--latent-dim", type=count, default=20, help="dimensions of z")
    parser.add_argument("--hidden-dim", type=count, default=400, help="units of a hidden layer")
    parser.add_argument("--epochs", type=count, default=14, help="passes over the data")
    parser.add_argument("--images", type=several, default=1000, help="test images for log p(x)")
    run(main, parser, num_samples=1000, out="runs/missing")
