"""Guides with draws that have no rsample: their gradients, exactly.

No Monte Carlo: each datum is a copy of one, with parameters of its own, and draws one of all the tuples that
its particles could have drawn. So one backward pass gives the estimator's gradient for every tuple, and their
sum, weighted by how likely each is, is its expectation, held against the gradient of the expected bound.
"""

import itertools
import math
from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from torch import nn

import pyro_vae as pv
from pyro_vae import elbos

THETA = torch.tensor([0.4, -0.3, 0.2, 0.5, -0.4, 0.3, 0.7, -0.2, 0.6, -0.5]).double()
X = torch.tensor(0.8).double()
# Reparameterised noise may have any distribution; this one gives a Gaussian's moments up to the fifth.
EPS = torch.tensor([-math.sqrt(3), 0.0, math.sqrt(3)], dtype=torch.float64)
EPS_PROBS = torch.tensor([1 / 6, 2 / 3, 1 / 6], dtype=torch.float64)


class Pair(PyroModule):
    """k of three values, u Gaussian, x ~ N(m_k + 0.7 u, 0.6); the guide draws the sites in a given order.

    theta is (10, copies). Of the second site drawn, q depends on the first.
    """

    def __init__(self, order=("k",), copies=1, plate=None, mask=None, masked=("k", "u", "x"), inner=0):
        super().__init__()
        self.theta = nn.Parameter(THETA.unsqueeze(1).repeat(1, copies))
        self.order, self.mask, self.masked, self.inner = order, mask, masked, inner
        self.plate = plate or (lambda x: pyro.plate("data", len(x), dim=-2 if inner else -1))

    def p_k(self):
        logits = torch.stack([0 * self.theta[0], self.theta[0], self.theta[1]], -1)
        return dist.Categorical(logits=logits.unsqueeze(-2) if self.inner else logits)

    def p_x(self, k, u):
        means = torch.stack([-1 + 0 * self.theta[2], self.theta[2], 1.5 + self.theta[3]], -1)
        if self.inner:
            means = means.unsqueeze(-2)
        m = means.expand(*k.shape, 3).gather(-1, k.unsqueeze(-1)).squeeze(-1)
        m = m.sum(-1, keepdim=True) if self.inner else m
        return dist.Normal(m + 0.7 * u, 0.6)

    def q_k(self, x, u):
        x, theta = (x, self.theta.unsqueeze(-1)) if self.inner else (x, self.theta)
        shift = torch.arange(self.inner).double() if self.inner else 0.0
        return dist.Categorical(logits=torch.stack([theta[4] * x + u, theta[5] + shift - u * x, 0 * x + 0 * u], -1))

    def q_u(self, x, k):
        return dist.Normal(self.theta[6] * x + self.theta[7] * (k - 0.5), (self.theta[8] + 0.2 * k).exp())

    def of(self, name):
        return poutine.mask(mask=self.mask) if name in self.masked and self.mask is not None else nullcontext()

    def across(self):
        return pyro.plate("across", self.inner, dim=-1) if self.inner else nullcontext()

    def model(self, x):
        with self.plate(x):
            with self.of("k"), self.across():
                k = pyro.sample("k", self.p_k())
            with self.of("u"):
                u = pyro.sample("u", dist.Normal(torch.zeros(()).double(), 1.0)) if "u" in self.order else 0.0
            with self.of("x"):
                pyro.sample("x", self.p_x(k, u), obs=x)

    def guide(self, x):
        drawn = {"k": torch.zeros(()).double(), "u": torch.zeros(()).double()}
        with self.plate(x):
            for name in self.order:
                with self.of(name), self.across() if name == "k" else nullcontext():
                    q = self.q_k(x, drawn["u"]) if name == "k" else self.q_u(x, drawn["k"])
                    drawn[name] = pyro.sample(name, q)


class Draw(Messenger):
    """Draw these: of k its values, of u its noise. One particle after the other, or all (K, ...) at once."""

    def __init__(self, one_by_one, **given):
        super().__init__()
        self.given = {name: list(rows) if one_by_one else [rows] for name, rows in given.items()}

    def _pyro_sample(self, msg):
        if msg["name"] in self.given and msg["value"] is None:
            given = self.given[msg["name"]].pop(0)
            msg["value"] = given if msg["name"] == "k" else msg["fn"].mean + msg["fn"].stddev * given


def tuples(order, particles, inner=0):
    """All that the particles of a datum could draw: k (K, copies[, inner]) and the noise of u, (K, copies)."""
    of_k = list(itertools.product(range(3), repeat=inner or 1))
    one = list(itertools.product(of_k, range(3) if "u" in order else [1]))
    found = list(itertools.product(one, repeat=particles))
    k = torch.tensor([[k for k, _ in row] for row in found]).transpose(0, 1)
    eps = torch.tensor([[i for _, i in row] for row in found]).T
    return (k if inner else k.squeeze(-1)), eps


def expected(pair, x, k, eps, alpha, of_x=1.0, beta=1.0):
    """Each tuple's probability and bound, (copies,), by their formulas."""
    has_u = "u" in pair.order
    zero = torch.zeros(()).double()
    q_u = pair.q_u(x, k if pair.order[0] == "k" else zero) if has_u else None
    u = q_u.mean + q_u.stddev * EPS[eps] if has_u else zero
    q_k = pair.q_k(x, zero if pair.order[0] == "k" else u)
    of_k, log_q = pair.p_k().log_prob(k), q_k.log_prob(k)
    probs = log_q.exp()
    if pair.inner:
        of_k, log_q, probs = of_k.sum(-1), log_q.sum(-1), probs.prod(-1)
    log_r = of_k - log_q
    if has_u:
        log_r = log_r + dist.Normal(zero, 1.0).log_prob(u) - q_u.log_prob(u)
        probs = probs * EPS_PROBS[eps]
    log_x = pair.p_x(k, u).log_prob(x)
    log_w = of_x * (log_x.squeeze(-1) if pair.inner else log_x) + beta * log_r
    if alpha == 1:
        return probs.prod(0), log_w.mean(0)
    return probs.prod(0), ((1 - alpha) * log_w).exp().mean(0).log() / (1 - alpha)


def gradients(elbo, pair, x, k, eps):
    """The loss, and its gradient for each tuple, (10, copies)."""
    elbo.loss(pair.model, pair.guide, x)  # its layout is found by runs with draws of their own
    one_by_one = elbo._layouts[next(reversed(elbo._layouts))].particle_dim is None
    rows = [k, EPS[eps]] if elbo.num_particles > 1 and not one_by_one else [k, EPS[eps]]
    with Draw(one_by_one, k=rows[0], u=rows[1]):
        loss = elbo.differentiable_loss(pair.model, pair.guide, x)
    return loss, torch.autograd.grad(loss, pair.theta)[0]


def check_exact(elbo, alpha, order, *, ratio=1.0, mask=None, of_x=1.0, beta=1.0, weights=None, **about):
    k, eps = tuples(order, elbo.num_particles, about.get("inner", 0))
    copies = k.shape[1]
    pair = Pair(order, copies, mask=mask, **about)
    x = X.expand(copies, 1) if pair.inner else X.expand(copies)
    with pv.scale_latents(beta):
        loss, grads = gradients(elbo, pair, x, k, eps)
    kept = dict(of_x=of_x, beta=beta) | (weights or {})
    probs, bounds = expected(pair, x, k, eps, alpha, **kept)
    (exact,) = torch.autograd.grad((probs * bounds).sum(), pair.theta)
    torch.testing.assert_close(probs.sum(), torch.ones(()).double())
    assert exact.sum(1).norm() > 0.01
    torch.testing.assert_close((grads * probs).sum(1), -ratio * exact.sum(1), rtol=1e-8, atol=1e-9)
    return loss, -ratio * bounds.sum()


OBJECTIVES = {
    "IWAE 1": (lambda: pv.IWAE(1), 0),
    "IWAE 2": (lambda: pv.IWAE(2), 0),
    "IWAE 2, one by one": (lambda: pv.IWAE(2, vectorize_particles=False), 0),
    "Renyi 0.5": (lambda: pv.Renyi(0.5, 2), 0.5),
    "Renyi -1": (lambda: pv.Renyi(-1, 2), -1),
    "Renyi 1": (lambda: pv.Renyi(1, 2), 1),
    "MeanField 1": (lambda: pv.MeanField(1), 1),
    "MeanField 2": (lambda: pv.MeanField(2), 1),
    "MeanField 2, one by one": (lambda: pv.MeanField(2, vectorize_particles=False), 1),
    "FreeBits": (lambda: pv.FreeBits(0.0), 1),
    "FreeBits 2, one by one": (lambda: pv.FreeBits(0.0, 2, vectorize_particles=False), 1),
}
objectives = pytest.mark.parametrize(("make", "alpha"), OBJECTIVES.values(), ids=OBJECTIVES)


@objectives
@pytest.mark.parametrize("order", [("k",), ("k", "u"), ("u", "k")], ids="-".join)
@pytest.mark.parametrize("beta", [1.0, 0.5, 0.0])
def test_the_gradient_is_exact(make, alpha, order, beta):
    """A discrete guide; one with a reparameterised site after the discrete one, or before it, on which it depends."""
    loss, value = check_exact(make(), alpha, order, beta=beta)
    if not isinstance(make(), pv.MeanField | pv.FreeBits):  # which have another value at a draw
        torch.testing.assert_close(loss, value)
