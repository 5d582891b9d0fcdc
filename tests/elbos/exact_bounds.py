"""Exact values and gradients of the bounds, by quadrature, and the check of an estimator against them."""

import math

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger

import pyro_vae as pv


class At(Messenger):
    """Put the latents of a Gaussian guide at mean + sigma * eps."""

    def __init__(self, eps):
        super().__init__()
        self.eps = eps

    def _pyro_sample(self, msg):
        if msg["name"] in self.eps:
            fn = msg["fn"]
            eps = self.eps[msg["name"]]
            msg["value"] = fn.mean + fn.stddev * eps.reshape(-1, 1, *[1] * fn.event_dim)


def quadrature(model, guide, x, latents=("z",), *, alpha=0.0, beta=1.0, particles=2, nodes=40):
    """Return the bound of one or two particles, (N,), by Gauss-Hermite quadrature over the guide's noise."""
    points, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(nodes))
    grid = torch.cartesian_prod(*[points] * len(latents)).reshape(-1, len(latents))
    weights = torch.cartesian_prod(*[weights / math.sqrt(2 * math.pi)] * len(latents))
    weights = weights.reshape(-1, len(latents)).prod(-1)
    plate = pyro.plate("nodes", len(grid), dim=-2)
    at = At({name: grid[:, i] for i, name in enumerate(latents)})
    guide_trace = poutine.trace(at(plate(guide))).get_trace(x)
    model_trace = poutine.trace(poutine.replay(plate(model), trace=guide_trace)).get_trace(x)
    guide_trace.compute_log_prob()
    model_trace.compute_log_prob()
    log_w = model_trace.nodes["x"]["unscaled_log_prob"]
    for name in latents:
        p, q = (trace.nodes[name]["unscaled_log_prob"] for trace in (model_trace, guide_trace))
        log_w = log_w + beta * (p - q)
    if alpha == 1:
        return weights @ log_w
    assert particles == 2
    pairs = torch.logaddexp(*((1 - alpha) * part for part in (log_w.unsqueeze(0), log_w.unsqueeze(1))))
    return torch.einsum("i,j,ijn->n", weights, weights, (pairs - math.log(2)) / (1 - alpha))


def flat(value, trained):
    """Return a value and its gradients as one vector."""
    grads = torch.autograd.grad(value, trained, retain_graph=True)
    return torch.cat([value.reshape(1), *(g.flatten() for g in grads)]).detach()


def check_unbiased(elbo, model, guide, x, exact, *, beta=1.0, copies=150, draws=30, noise=0.05):
    """Check value and gradients against the exact ones, within five standard errors, which must be small."""
    trained = pv.parameters(model, guide)
    exact = flat(-exact.sum(), trained)
    found = []
    with pv.scale_latents(beta):
        for _ in range(draws):
            loss = elbo.differentiable_loss(model, guide, x.repeat(copies, 1))
            found.append(flat(loss, trained) / copies)
    found = torch.stack(found)
    error = found.std(0) / math.sqrt(draws)
    assert ((found.mean(0) - exact).abs() < 5 * error + 1e-4 * exact.abs().max()).all()
    assert error[1:].norm() < noise * exact[1:].norm()


def weighted_loss(pair, elbo, x, beta=0.7):
    """Return the loss of a Plated pair under a KL weight, and its gradients, always with the same noise."""
    torch.manual_seed(2)
    with pv.scale_latents(beta):
        return flat(elbo.differentiable_loss(pair.model, pair.guide, x), list(pair.parameters()))
