"""The two models of autoencoder.py: an autoencoder and a VAE with the same networks."""

import argparse
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor, nn

import pyro_vae as pv


class Trained(NamedTuple):
    """A trained pair of networks: z of images, E[x | z], and numbers in nats per data point."""

    encode: Callable[[Tensor], Tensor]  # for the VAE a draw from q(z | x)
    decode: Callable[[Tensor], Tensor]
    reconstruction: float
    log_p: float | None  # at least; an autoencoder has none


def adam(networks: Iterable[nn.Module], steps: int) -> torch.optim.lr_scheduler.OneCycleLR:
    """Return Adam on one cycle of its learning rate."""
    parameters = [p for network in networks for p in network.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=2e-3, fused=True)
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)


def step(scheduler: torch.optim.lr_scheduler.OneCycleLR, loss: Tensor) -> None:
    """Take a gradient step."""
    scheduler.optimizer.zero_grad()
    loss.backward()
    scheduler.optimizer.step()
    scheduler.step()


def autoencoder(latent: int, batches: pv.data.Batches, x: Tensor, options: argparse.Namespace) -> Trained:
    """Minimise the binary cross-entropy of x_hat = decoder(encoder(x))."""
    encoder = pv.MLP(784, options.hidden_dim, latent).to(x.device)
    decoder = pv.MLP(latent, options.hidden_dim, 784).to(x.device)

    def loss(x: Tensor) -> Tensor:  # summed over the pixels, the mean over the images
        logits = decoder(encoder(x))
        return F.binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x)

    scheduler = adam((encoder, decoder), options.epochs * len(batches))
    for _ in range(options.epochs):
        for batch in batches:
            step(scheduler, loss(batch))
    return Trained(encoder, lambda z: decoder(z).sigmoid(), -loss(x).item(), None)


def vae(latent: int, batches: pv.data.Batches, x: Tensor, options: argparse.Namespace) -> Trained:
    """Maximise the ELBO: the same cross-entropy, with noise in the code and a KL to the prior."""
    encoder = nn.Sequential(pv.MLP(784, options.hidden_dim, 2 * latent), pv.DiagNormal())
    decoder = nn.Sequential(pv.MLP(latent, options.hidden_dim, 784), pv.Bernoulli())
    model, guide = pv.Model(pv.StandardNormal(latent), decoder).to(x.device), pv.Guide(encoder).to(x.device)
    scheduler = adam((model, guide), options.epochs * len(batches))
    svi = pv.SVI(model, guide, scheduler.optimizer, loss=TraceMeanField_ELBO())
    for _ in pv.fit(svi, batches, options.epochs, scheduler=scheduler):
        pass
    reconstruction = pv.elbo_terms(model, guide, x).reconstruction.mean().item()
    log_p = pv.log_evidence(model, guide, x[: options.images], options.num_samples).mean().item()
    return Trained(guide, lambda z: decoder(z).mean, reconstruction, log_p)
