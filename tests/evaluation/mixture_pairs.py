"""A mixture whose component k is enumerated in the model and left out of the guide."""

import math

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule

PARALLEL = {"enumerate": "parallel"}


WEIGHTS, CENTRES = torch.tensor([0.2, 0.3, 0.5]), torch.tensor([-3.0, 0.0, 2.0])


class Mixture(PyroModule):
    """k ~ p(k), z ~ N(c_k, 1/4), x ~ N(z + k, 1), so that x ~ sum_k p(k) N(c_k + k, 5/4)."""

    def forward(self, x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(WEIGHTS), infer=PARALLEL)
            z = pyro.sample("z", dist.Normal(CENTRES[k], 0.5))
            pyro.sample("x", dist.Normal(z + k, 1.0), obs=x)


class MixtureGuide(PyroModule):
    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 2.0))


def components(x):
    """log p(k) + log p(x | k), (N, 3)."""
    return WEIGHTS.log() + dist.Normal(CENTRES + torch.arange(3), math.sqrt(1.25)).log_prob(x[:, None])
