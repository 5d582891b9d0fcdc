"""Closed forms of the linear-Gaussian VAE for data with missing entries, which are NaN."""

import math

import torch
from torch.distributions import MultivariateNormal

import pyro_vae as pv


def gaussian(model):
    """p(x) = N(b, W W^T + s^2 I): its mean and covariance."""
    linear, family = model.decoder
    variance = family(linear.bias).base_dist.scale[0] ** 2
    return linear.bias, linear.weight @ linear.weight.T + variance * torch.eye(len(linear.weight)).double()


def evidence(model, x):
    """log p(x_o), (N,)."""
    mean, covariance = gaussian(model)
    values = []
    for row in x:
        o = ~row.isnan()
        p = MultivariateNormal(mean[o], covariance[o][:, o]) if o.any() else None
        values.append(p.log_prob(row[o]) if p else mean.sum() * 0)
    return torch.stack(values)


def conditional(model, row):
    """p(x_m | x_o) of one row: its mean and covariance."""
    mean, covariance = (each.detach() for each in gaussian(model))
    o, m = ~row.isnan(), row.isnan()
    gain = torch.linalg.solve(covariance[o][:, o], covariance[o][:, m]).T
    return mean[m] + gain @ (row[o] - mean[o]), covariance[m][:, m] - gain @ covariance[o][:, m]


def linear(size=30, share=0.4):
    """A pair near its posterior, and data of which a share is missing, all of row 3."""
    model, guide = pv.references.linear_gaussian()
    pv.references.set_to_posterior(model, guide, spread=1.5)
    x = torch.randn(size, 5, dtype=torch.float64)
    missing = torch.rand(x.shape) < share
    missing[3] = True
    return model, guide, x.masked_fill(missing, math.nan)
