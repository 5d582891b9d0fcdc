"""The linear-Gaussian VAE, in which everything has a closed form.

p(z) = N(0, I), p(x | z) = N(W z + b, s^2 I), q(z | x) = N(A x + c, diag exp(2 l)), in float64.
(Tipping and Bishop 1999, Probabilistic Principal Component Analysis.)
"""

import math

import torch
from torch import Tensor, nn

import pyro_vae as pv


def pair(width=5, dim=2, sigma=0.7):
    model = pv.Model(
        pv.StandardNormal(dim).double(),
        nn.Sequential(nn.Linear(dim, width), pv.Gaussian(sigma)).double(),
    )
    guide = pv.Guide(nn.Sequential(nn.Linear(width, 2 * dim), pv.DiagNormal()).double())
    return model, guide


def near_posterior(model, guide):
    """Set the guide to the posterior's mean and 1.3 times its spread: weights of finite variance."""
    linear, family = model.decoder
    variance = family(linear.bias).base_dist.scale[0] ** 2
    weight = linear.weight
    inner = weight.T @ weight + variance * torch.eye(weight.shape[1]).to(weight)
    gain = torch.linalg.solve(inner, weight.T)
    spread = 1.3 * (variance * torch.linalg.inv(inner)).diagonal().sqrt()
    encoder = guide.encoder[0]
    with torch.no_grad():
        encoder.weight.copy_(torch.cat([gain, torch.zeros_like(gain)]))
        encoder.bias.copy_(torch.cat([-gain @ linear.bias, spread.log()]))


def evidence(model, x: Tensor) -> Tensor:
    """log N(x; b, W W^T + s^2 I), (N,)."""
    linear, family = model.decoder
    variance = family(linear.bias).base_dist.scale[0] ** 2
    covariance = linear.weight @ linear.weight.T + variance * torch.eye(x.shape[1]).to(x)
    return torch.distributions.MultivariateNormal(linear.bias, covariance).log_prob(x)


def posterior(model, x: Tensor) -> torch.distributions.MultivariateNormal:
    """p(z | x) = N(M^-1 W^T (x - b), s^2 M^-1), M = W^T W + s^2 I."""
    linear, family = model.decoder
    variance = family(linear.bias).base_dist.scale[0] ** 2
    weight = linear.weight
    inner = weight.T @ weight + variance * torch.eye(weight.shape[1]).to(x)
    mean = torch.linalg.solve(inner, weight.T @ (x - linear.bias).T).T
    return torch.distributions.MultivariateNormal(mean, variance * torch.linalg.inv(inner))


def elbo(model, guide, x: Tensor) -> tuple[Tensor, Tensor]:
    """E_q[log p(x | z)] and KL(q || p), both (N,), differentiable."""
    linear, family = model.decoder
    variance = family(linear.bias).base_dist.scale[0] ** 2
    mean, log_sigma = guide.encoder[0](x).chunk(2, -1)
    sse = (x - linear(mean)).square().sum(-1)
    spread = ((2 * log_sigma).exp() * linear.weight.square().sum(0)).sum(-1)
    width = x.shape[1]
    constant = width / 2 * torch.log(2 * math.pi * variance)
    kl = 0.5 * ((2 * log_sigma).exp() + mean.square() - 1 - 2 * log_sigma).sum(-1)
    return -(sse + spread) / (2 * variance) - constant, kl
