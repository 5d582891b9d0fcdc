"""How good are new digits? A classifier compares them with real ones."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyro_vae as pv


def train_classifier(images: Tensor, labels: Tensor) -> nn.Sequential:
    """Return a network from binary images to 32 features, and a linear layer from these to the digit.

    Args:
        images: grey pixels ``(N, 784)``, from which each epoch draws binary ones.
        labels: the digits ``(N,)``.
    """
    features = nn.Sequential(pv.MLP(784, 256, 32, activation=nn.SiLU), nn.SiLU())
    classifier = nn.Sequential(features, nn.Linear(32, 10)).to(images.device)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=1e-3, fused=True)
    for _ in range(4):
        for rows in torch.randperm(len(images), device=images.device).split(128):
            optimizer.zero_grad()
            F.cross_entropy(classifier(images[rows].bernoulli()), labels[rows]).backward()
            optimizer.step()
    return classifier


def frechet(a: Tensor, b: Tensor) -> float:
    """Return |m - n|^2 + tr(S + T - 2 (S T)^(1/2)): m, S and n, T are mean and covariance of the rows.

    It is the squared Wasserstein distance of two Gaussians (Dowson and Landau 1982).
    """
    a, b = a.double(), b.double()
    s, t = a.T.cov(), b.T.cov()
    root = torch.linalg.eigvals(s @ t).real.clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + s.trace() + t.trace() - 2 * root)


@torch.no_grad()
def judge(classifier: nn.Sequential, x: Tensor, real: Tensor) -> dict[str, float]:
    """Return the Frechet distance of x from real images, and the mean entropy of p(digit | x) in nats."""
    log_p = classifier(x).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1).mean().item()
    return {"frechet": frechet(classifier[0](x), classifier[0](real)), "entropy": entropy}
