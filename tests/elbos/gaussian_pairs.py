"""Linear Gaussian pairs with two latent sites, and with plates and masks of every kind."""

import math
from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import nn


class Deep(PyroModule):
    """z2 ~ N(0, 1); z1 ~ N(a z2, 0.8); x ~ N(b z1 + c z2, 0.7)."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.7).double())
        self.b, self.c = (nn.Parameter(torch.randn(3).double()) for _ in range(2))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(torch.zeros(()).double(), 1.0))
            z1 = pyro.sample("z1", dist.Normal(self.a * z2, 0.8))
            loc = self.b * z1.unsqueeze(-1) + self.c * z2.unsqueeze(-1)
            pyro.sample("x", dist.Normal(loc, 0.7).to_event(1), obs=x)


class Chain(PyroModule):
    """q(first | x) q(second | first, x), linear and Gaussian."""

    def __init__(self, first, second, net=None):
        super().__init__()
        self.names = first, second
        self.w = nn.Parameter(0.2 * torch.randn(2, 3).double())
        self.d = nn.Parameter(torch.tensor([0.4, 0.6]).double())
        self.log_sigma = nn.Parameter(torch.tensor([-0.5, -0.4]).double())
        self.net = net or nn.Identity()

    def forward(self, x):
        first, second = self.names
        h, sigma = self.net(x) @ self.w.T, self.log_sigma.exp()
        with pyro.plate("data", len(x)):
            z = pyro.sample(first, dist.Normal(h[..., 0] + self.d[0], sigma[0]))
            pyro.sample(second, dist.Normal(h[..., 1] + self.d[1] * z, sigma[1]))


def posterior_chain(model, first, second, spread=1.0):
    """Return the posterior of Deep as a chain in either order, with its sigma times a factor."""
    a, b, c = (p.detach() for p in (model.a, model.b, model.c))
    factors = torch.stack([b, c])
    loading = factors / 0.49
    precision = (
        loading @ factors.T + torch.tensor([[1 / 0.64, -a / 0.64], [-a / 0.64, 1 + a**2 / 0.64]]).double()
    )
    covariance = torch.linalg.inv(precision)
    f, s = (("z1", "z2").index(name) for name in (first, second))
    guide = Chain(first, second)
    with torch.no_grad():
        guide.w.copy_(torch.stack([(covariance @ loading)[f], loading[s] / precision[s, s]]))
        guide.d.copy_(torch.stack([0 * a, -precision[s, f] / precision[s, s]]))
        guide.log_sigma.copy_(
            torch.stack([covariance[f, f], 1 / precision[s, s]]).log() / 2 + math.log(spread)
        )
    return guide


class Plated(PyroModule):
    """A pair with one latent per data point, in a plate of the caller's, with inner plates or events."""

    def __init__(self, plate, inner=False, mask=None):
        super().__init__()
        self.plate, self.inner, self.mask = plate, inner, mask
        self.loc = nn.Parameter(torch.tensor([0.3, -0.2, 0.5]).double())
        self.w = nn.Parameter(torch.tensor(0.4).double())

    def side(self, x, q):
        across = pyro.plate("across", 3, dim=-1) if self.inner else nullcontext()
        event = 0 if self.inner else 1
        with self.plate(x), poutine.mask(mask=True if self.mask is None else self.mask):
            with across:
                loc = self.w * x + self.loc if q else torch.zeros(3).double()
                z = pyro.sample("z", dist.Normal(loc, 0.8 if q else 1.0).to_event(event))
            if not q:
                with across:
                    pyro.sample("x", dist.Normal(z, 0.7).to_event(event), obs=x)

    def model(self, x):
        self.side(x, False)

    def guide(self, x):
        self.side(x, True)


def whole(x):
    return pyro.plate("data", len(x))


def subsampled(x):
    return pyro.plate("data", 10, subsample=torch.arange(len(x)))


def outer(x):
    return pyro.plate("data", len(x), dim=-2)
