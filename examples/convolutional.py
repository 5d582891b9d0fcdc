"""Train a convolutional VAE on MNIST; print its test log evidence.

    python examples/convolutional.py

Model and guide are those of the plain VAE. The networks see images: they take
flat pixels, as all of the package does, with any dimensions on their left, so
importance samples and particles run side by side.
"""

import argparse

import torch
from pyro.infer import TraceMeanField_ELBO
from torch import nn

import pyro_vae as pv
from command_line import Parser, count, run, several
from results import save_pictures, save_weights


def main(options: argparse.Namespace) -> None:
    """Train, evaluate and draw."""
    protocol = pv.data.DynamicBinarisation()
    train, test = pv.data.load(train=True), pv.data.load(train=False)
    batches = pv.data.Batches(train, protocol, batch_size=128, device=options.device)
    x = pv.data.observe(test, protocol).to(options.device)
    x_test = x[: options.images]

    # Networks: 28 x 28 -> 14 x 14 -> 7 x 7 -> features, and back.
    latent, (wide, small), shape = options.latent_dim, options.channels, (1, 28, 28)
    down = pv.ConvDown(shape, wide, small, num_features=2 * latent, activation=nn.SiLU)
    up = pv.ConvUp(latent, small, wide, shape=shape, activation=nn.SiLU)

    # Model: z ~ N(0, I), x ~ p(x | z). Guide: z ~ q(z | x).
    model = pv.Model(pv.StandardNormal(latent), nn.Sequential(up, pv.Bernoulli())).to(options.device)
    guide = pv.Guide(nn.Sequential(down, pv.DiagNormal())).to(options.device)

    optimizer = torch.optim.Adam(pv.parameters(model, guide), lr=2e-3, fused=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, options.epochs * len(batches))
    svi = pv.SVI(model, guide, optimizer, loss=TraceMeanField_ELBO())
    for epoch in pv.fit(svi, batches, options.epochs, watch=x_test[:1000], scheduler=scheduler):
        print(epoch)

    terms = pv.elbo_terms(model, guide, x_test)
    evidence = pv.log_evidence(model, guide, x_test, options.num_samples)
    z = pv.latent_terms(model, guide, x_test[:500], num_samples=50)["z"]
    print(
        f"convolutional, mnist test, {protocol}, log mass in nats per data point: ELBO "
        f"{terms.elbo.mean():.2f}, KL {terms.kl.mean():.2f}, {int(z.active.sum())} of {latent} dimensions "
        f"active, log p(x) at least {evidence.mean():.2f} ({len(x_test)} images, {options.num_samples} "
        "importance samples)"
    )

    save_weights(options.out, model, guide)
    with torch.no_grad():
        mean = guide.encoder(x[:20]).mean
        axes = z.spread.argsort(descending=True)[:8].tolist()  # the latents that move E[z | x] most
        lines = model.decoder(pv.plots.latent_lines(mean[0], dimensions=axes)).mean
        paths = model.decoder(pv.plots.latent_paths(mean[:10], mean[10:])).mean
        generated = pv.generate(model, x_test[:100])["x"].mean
    pictures = {
        "traversals": pv.plots.traversals(lines, dimensions=axes),
        "interpolations": pv.plots.interpolations(paths),
        "samples": pv.plots.images(generated, title="E[x | z], z from the prior"),
    }
    save_pictures(options.out, pictures)


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("--latent-dim", type=count, default=20, help="dimensions of z")
    parser.add_argument("--channels", type=count, nargs=2, default=[32, 64], help="of the two convolutions")
    parser.add_argument("--epochs", type=count, default=14, help="passes over the data")
    parser.add_argument("--images", type=several, default=1000, help="test images for log p(x)")
    run(main, parser, num_samples=1000, out="runs/convolutional")
