"""What the tests of CompiledELBO share: programs, and training steps compiled and eager."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch._inductor
from pyro.infer import RenyiELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.nn import PyroModule
from registry import pair
from torch import nn

import pyro_vae as pv

# torch 2.11's compiler uses what torch deprecates.
compiles = pytest.mark.filterwarnings("default")

ELBOS = {
    "trace": Trace_ELBO,
    "mean-field": TraceMeanField_ELBO,
    "graph": TraceGraph_ELBO,
    "particles": lambda: Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1),
    "renyi": lambda: RenyiELBO(alpha=0, num_particles=3, vectorize_particles=True, max_plate_nesting=1),
}


def replayed(elbo, **options):
    """Capture the ELBO, and replay its operations one by one."""
    return pv.CompiledELBO(elbo, backend="eager", **options)


def adam(lr=1e-2):
    return pyro.optim.Adam({"lr": lr})


def losses(svi, batches):
    torch.manual_seed(1)
    return [svi.step(*batch) if isinstance(batch, tuple) else svi.step(batch) for batch in batches]


def assert_same_training(programs, elbo, batches, svi_class=pv.SVI):
    """Eager and compiled, on twins: losses and parameters agree to float precision."""
    twins = copy.deepcopy(programs)
    eager = losses(pv.SVI(*programs, adam(), loss=elbo), batches)
    compiled = losses(svi_class(*twins, adam(), loss=replayed(elbo)), batches)
    assert compiled == pytest.approx(eager, rel=1e-5, abs=1e-4)
    for ours, theirs in zip(programs, twins, strict=True):
        if isinstance(ours, nn.Module):
            torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-4, atol=1e-6)


def captured_step(elbo, model, guide, x):
    """Return the graph of a step, as CompiledELBO gives it to torch's compiler, and its inputs."""
    given = []

    def compile_nothing(graph, inputs, options):
        given.append((graph, inputs))
        return graph

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch._inductor, "compile", compile_nothing)
        pv.CompiledELBO(elbo).loss_and_grads(model, guide, x)
    ((graph, inputs),) = given
    return graph, inputs


class Weighted(PyroModule):
    """A model whose likelihood is weighted by an argument."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, weight, scale=1.0):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.model.prior())
            logits = weight * scale * self.model.decoder[0](z)
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)


class Ignoring(PyroModule):
    def __init__(self, guide):
        super().__init__()
        self.guide = guide

    def forward(self, x, weight, scale=1.0):
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.guide.encoder(x))


def weighted_pair():
    model, guide = pair()
    return Weighted(model), Ignoring(guide)


class Normed(PyroModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.3), nn.Linear(5, 4), pv.DiagNormal()
        )

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.net(x))


class Targeted(PyroModule):
    """Reads x and observes y; holds a reference, and two parameters whose sum alone is used."""

    def __init__(self, x):
        super().__init__()
        self.ref = x
        self.a, self.b = (nn.Parameter(torch.zeros(2)) for _ in range(2))

    def model(self, x, y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(z + self.ref.mean(0) + (self.a + self.b), 1.0).to_event(1), obs=y)

    def guide(self, x, y):
        with pyro.plate("data", len(y)):
            x = torch.as_tensor(x["x"] if isinstance(x, dict) else x)
            pyro.sample("z", dist.Normal(x, 0.5).to_event(1))


def loss_of(elbo, pair, *batch):
    torch.manual_seed(0)
    return elbo.loss(pair.model, pair.guide, *batch)


class Sharp(PyroModule):
    """A model that adds `function(w)`, which is 0 at w = 0, to the mean of x."""

    def __init__(self, function, width=1):
        super().__init__()
        self.function = function
        self.w = nn.Parameter(torch.zeros(width))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", pv.StandardNormal(2)())
            loc = z.sum(-1, keepdim=True) + self.function(self.w).sum()
            pyro.sample("x", dist.Normal(loc.expand(-1, 6), 1.0).to_event(1), obs=x)
