"""Train a VAE with a learned prior on MNIST; print its test log evidence.

    python examples/priors.py --prior vamp

Model: z ~ p(z), which is learned; x ~ p(x | z). Guide: q(z | x), a factorised
Gaussian as usual.
"""

import argparse

import torch
from pyro.infer import Trace_ELBO
from torch import nn

import pyro_vae as pv
from command_line import Parser, count, run, several
from results import save_pictures, save_weights


def make_prior(
    name: str, latent: int, components: int, encoder: nn.Module, images: pv.data.Images
) -> nn.Module:
    """Return p(z)."""
    if name == "normal":
        return pv.StandardNormal(latent)
    if name == "mixture":
        return pv.MixturePrior(latent, components)
    if name == "flow":
        return pv.FlowPrior(latent)
    if components > len(images.pixels):
        most = len(images.pixels)
        raise ValueError(f"--components: expected up to {most} images, got {components}. To fix: write 500.")
    # p(z) = 1 / K sum_k q(z | u_k): the guide's own encoder at pseudo-inputs u_k, which start as images.
    return pv.VampPrior(encoder, pv.data.observe(images, pv.data.Grey())[:components])


def main(options: argparse.Namespace) -> None:
    """Train, evaluate and draw."""
    protocol = pv.data.DynamicBinarisation()
    train, test = pv.data.load(train=True), pv.data.load(train=False)
    batches = pv.data.Batches(train, protocol, batch_size=128, device=options.device)
    x_test = pv.data.observe(test, protocol)[: options.images].to(options.device)

    # Guide: q(z | x) = N(mu, diag sigma^2).
    latent, hidden = options.latent_dim, options.hidden_dim
    encoder = nn.Sequential(pv.MLP(784, hidden, hidden, 2 * latent, activation=nn.SiLU), pv.DiagNormal())
    guide = pv.Guide(encoder).to(options.device)

    # Model: z ~ p(z), x ~ p(x | z).
    prior = make_prior(options.prior, latent, options.components, encoder, train)
    decoder = nn.Sequential(pv.MLP(latent, hidden, hidden, 784, activation=nn.SiLU), pv.Bernoulli())
    model = pv.Model(prior, decoder).to(options.device)

    # The KL from a learned prior has no closed form, so this is the plain ELBO.
    optimizer = torch.optim.Adam(pv.parameters(model, guide), lr=3e-3, fused=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, options.epochs * len(batches))
    svi = pv.SVI(model, guide, optimizer, loss=Trace_ELBO())
    for epoch in pv.fit(svi, batches, options.epochs, watch=x_test[:1000], scheduler=scheduler):
        print(epoch)

    terms = pv.elbo_terms(model, guide, x_test)
    evidence = pv.log_evidence(model, guide, x_test, options.num_samples)
    z = pv.latent_terms(model, guide, x_test[:1000], num_samples=50)["z"]
    print(
        f"{options.prior} prior, mnist test, {protocol}, log mass in nats per data point: ELBO "
        f"{terms.elbo.mean():.2f}, KL {terms.kl.mean():.2f}, {int(z.active.sum())} of {latent} dimensions "
        f"active, log p(x) at least {evidence.mean():.2f} ({len(x_test)} images, {options.num_samples} "
        "importance samples)"
    )

    save_weights(options.out, model, guide)
    generated = pv.generate(model, x_test[:100])["x"].mean
    pictures = {"samples": pv.plots.images(generated, title=f"E[x | z], z from the {options.prior} prior")}
    if isinstance(prior, pv.VampPrior):
        pictures["pseudo_inputs"] = pv.plots.images(prior.pseudo_inputs[:100], title="pseudo-inputs")
    save_pictures(options.out, pictures)


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("--prior", choices=["normal", "mixture", "vamp", "flow"], default="vamp", help="p(z)")
    parser.add_argument("--components", type=count, default=500, help="of the mixtures")
    parser.add_argument("--latent-dim", type=count, default=20, help="dimensions of z")
    parser.add_argument("--hidden-dim", type=count, default=400, help="units of a hidden layer")
    parser.add_argument("--epochs", type=count, default=14, help="passes over the data")
    parser.add_argument("--images", type=several, default=2000, help="test images for log p(x)")
    run(main, parser, num_samples=1000, out="runs/priors")
