"""Train a VAE with a richer posterior on MNIST; print its test log evidence.

    python examples/posteriors.py --posterior flow

Model: z ~ N(0, I); x ~ p(x | z). Only the guide q(z | x) changes: a factorised
Gaussian, a Gaussian of any covariance, or a normalising flow.
"""

import argparse
from collections.abc import Callable

import torch
from pyro.infer import TraceMeanField_ELBO
from torch import nn

import pyro_vae as pv
from command_line import Parser, count, run, several
from results import machine, save_pictures, save_weights, write_summary

# name: latent size -> family of q(z | x)
POSTERIORS: dict[str, Callable[[int], pv.Family]] = {
    "factorised": lambda _: pv.DiagNormal(),  # z = mu + sigma e
    "full": lambda _: pv.FullNormal(),  # z = mu + L e, L = diag(sigma) U
    "flow": pv.FlowNormal,  # z = mu + sigma f_h(e), where f_h depends on x by the context h
}


def main(options: argparse.Namespace) -> None:
    """Train, evaluate and draw."""
    protocol = pv.data.DynamicBinarisation()
    train, test = pv.data.load(train=True), pv.data.load(train=False)
    batches = pv.data.Batches(train, protocol, batch_size=128, device=options.device)
    x_test = pv.data.observe(test, protocol)[: options.images].to(options.device)

    # Guide: one network, and the family that reads its features. Model: z ~ N(0, I), x ~ p(x | z).
    latent, hidden = options.latent_dim, options.hidden_dim
    family = POSTERIORS[options.posterior](latent)
    encoder = pv.MLP(784, hidden, hidden, family.num_features(latent), activation=nn.SiLU)
    decoder = pv.MLP(latent, hidden, hidden, 784, activation=nn.SiLU)
    guide = pv.Guide(nn.Sequential(encoder, family)).to(options.device)
    model = pv.Model(pv.StandardNormal(latent), nn.Sequential(decoder, pv.Bernoulli())).to(options.device)

    # The KL is in closed form for the Gaussians. A flow has none: there this is the plain ELBO.
    optimizer = torch.optim.Adam(pv.parameters(model, guide), lr=3e-3, fused=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, options.epochs * len(batches))
    svi = pv.SVI(model, guide, optimizer, loss=TraceMeanField_ELBO())
    for epoch in pv.fit(svi, batches, options.epochs, watch=x_test[:1000], scheduler=scheduler):
        print(epoch)

    # log p(x) - ELBO = KL(q(z | x) || p(z | x)): what the posterior misses.
    terms = pv.elbo_terms(model, guide, x_test)
    evidence = pv.log_evidence(model, guide, x_test, options.num_samples)
    z = pv.latent_terms(model, guide, x_test[:1000], num_samples=50)["z"]
    print(
        f"{options.posterior} posterior, mnist test, {protocol}, log mass in nats per data point: ELBO "
        f"{terms.elbo.mean():.2f}, KL {terms.kl.mean():.2f}, {int(z.active.sum())} of {latent} dimensions "
        f"active, log p(x) at least {evidence.mean():.2f} ({len(x_test)} images, {options.num_samples} "
        f"importance samples), gap {(evidence.mean() - terms.elbo.mean()):.2f}"
    )
    # The gap of some images, split: what the best q of the family misses, and what the encoder adds to that.
    gaps = pv.inference_gaps(model, guide, x_test[: options.gap_images], options.steps)
    fields = ("approximation", "amortisation", "elbo", "log_evidence")
    numbers: dict[str, float] = {}
    for name in fields:
        values = getattr(gaps, name).double()
        numbers |= {name: values.mean().item(), f"{name}_error": values.std().item() / len(values) ** 0.5}
    print(
        f"gap of {len(gaps.elbo)} images in nats per data point: {numbers['approximation']:.2f} ± "
        f"{numbers['approximation_error']:.2f} by the family, {numbers['amortisation']:.2f} ± "
        f"{numbers['amortisation_error']:.2f} by the encoder"
    )
    about = {"dataset": "mnist", "protocol": str(protocol), "unit": "nats per data point, log mass"}
    write_summary(options, about | numbers | {"machine": machine(options.device)})

    save_weights(options.out, model, guide)
    reconstructed = pv.reconstruct(model, guide, x_test[:30])["x"].mean
    generated = pv.generate(model, x_test[:100])["x"].mean
    pictures = {
        "reconstructions": pv.plots.reconstructions(x_test[:30], reconstructed),
        "samples": pv.plots.images(generated, title="E[x | z], z from the prior"),
    }
    save_pictures(options.out, pictures)


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("--posterior", choices=POSTERIORS, default="flow", help="the family of q(z | x)")
    parser.add_argument("--latent-dim", type=count, default=20, help="dimensions of z")
    parser.add_argument("--hidden-dim", type=count, default=400, help="units of a hidden layer")
    parser.add_argument("--epochs", type=count, default=14, help="passes over the data")
    parser.add_argument("--images", type=several, default=2000, help="test images for log p(x)")
    parser.add_argument("--gap-images", type=several, default=256, help="test images whose gap is split")
    parser.add_argument("--steps", type=count, default=1000, help="to find the best q of an image")
    run(main, parser, num_samples=1000, out="runs/posteriors")
