"""The gradients of a captured step: their numbers, and their place in memory."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from compiled_steps import Sharp, Targeted, adam, compiles, losses, replayed
from pyro.infer import Trace_ELBO
from pyro.nn import PyroModule
from registry import data, pair
from torch import nn

import pyro_vae as pv


def test_the_gradient_is_not_doubled():
    model, guide = pair()
    x = data()
    trained = pv.parameters(model, guide)
    torch.manual_seed(0)
    loss = Trace_ELBO().differentiable_loss(model, guide, x)
    expected = torch.autograd.grad(loss, trained)
    torch.manual_seed(0)
    replayed(Trace_ELBO()).loss_and_grads(model, guide, x)
    torch.testing.assert_close([p.grad for p in trained], list(expected))
    torch.manual_seed(0)
    replayed(Trace_ELBO()).loss_and_grads(model, guide, x)  # and is added to what is there
    torch.testing.assert_close([p.grad for p in trained], [2 * g for g in expected])


@pytest.mark.parametrize("elbo", [Trace_ELBO(num_particles=2), Trace_ELBO()])
def test_a_weight_that_is_used_twice_under_autocast(elbo):
    """Its gradients are added before they are rounded, as they are in Pyro without autocast's cache."""
    decoder = nn.Sequential(pv.MLP(16, 20, 34), pv.Bernoulli())
    encoder = nn.Sequential(pv.MLP(34, 20, 32), pv.DiagNormal())
    model = pv.Model(pv.VampPrior(encoder, torch.rand(4, 34)), decoder)
    guide, x = pv.Guide(encoder), data(width=34)
    trained, found = pv.parameters(model, guide), []
    for each in (elbo, replayed(elbo)):
        for p in trained:
            p.grad = None
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=each is not elbo):
            found.append((each.loss_and_grads(model, guide, x), [p.grad for p in trained]))
            assert torch.is_autocast_cache_enabled() == (each is not elbo)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


def test_gradients_share_no_memory():
    """Else what works in place on gradients, as clipping does, would do so twice."""
    x = torch.randn(4, 2)
    pair = Targeted(x)
    elbo = replayed(Trace_ELBO())
    elbo.loss_and_grads(pair.model, pair.guide, x, x)
    torch.testing.assert_close(pair.a.grad, pair.b.grad)
    assert pair.a.grad.data_ptr() != pair.b.grad.data_ptr()


class Mixed(PyroModule):
    """A guide whose parameters' gradients come as a transpose and as an expansion."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(2, 6, generator=generator) / 3)
        self.shift = nn.Parameter(torch.randn(5, generator=generator))
        self.spread = nn.Parameter(torch.zeros(2))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            loc = torch.einsum("bi,oi->bo", x, self.weight) + self.shift.sum()
            pyro.sample("z", dist.Normal(loc, self.spread.exp()).to_event(1))


@compiles
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_gradients_have_the_strides_of_their_parameters(backend):
    """Torch's fused Adam takes for granted that they do."""
    programs = pair()[0], Mixed()
    twins = copy.deepcopy(programs)
    batches = [data()] * 5
    losses(pv.SVI(*programs, adam(), loss=Trace_ELBO()), batches)
    optimizer = torch.optim.Adam(pv.parameters(*twins), lr=1e-2, fused=True)
    elbo = pv.CompiledELBO(Trace_ELBO(), backend=backend)
    losses(pv.SVI(*twins, optimizer, loss=elbo), batches)
    torch.testing.assert_close(programs[1].state_dict(), twins[1].state_dict(), rtol=1e-4, atol=1e-6)
    assert all(p.grad.stride() == p.stride() for p in pv.parameters(*twins))


@pytest.mark.parametrize("around", [replayed, lambda elbo: elbo], ids=["compiled", "eager"])
def test_finite_gradients_whose_sum_overflows_are_taken(around):
    torch.manual_seed(0)
    model, guide = Sharp(lambda w: 1e37 * w, width=200), pair()[1].requires_grad_(False)
    svi = pv.SVI(model, guide, torch.optim.SGD([model.w], lr=1e-36), loss=around(Trace_ELBO()))
    svi.step(torch.ones(1, 6))
    gradient = model.w.grad
    assert gradient.isfinite().all()
    assert not gradient.sum().isfinite()
    assert model.w.isfinite().all()
    assert (model.w != 0).all()


@pytest.mark.parametrize("around", [replayed, lambda elbo: elbo], ids=["compiled", "eager"])
def test_the_gradient_of_a_parameter_outside_the_optimiser_may_be_anything(around):
    model, guide = Sharp(lambda w: (w * w).sqrt()), pair()[1]
    svi = pv.SVI(model, guide, torch.optim.Adam(guide.parameters()), loss=around(Trace_ELBO()))
    with pytest.warns(UserWarning, match="the model does not train"):
        svi.step(data())
    assert model.w.grad.isnan().all()
    assert all(p.isfinite().all() for p in guide.parameters())
