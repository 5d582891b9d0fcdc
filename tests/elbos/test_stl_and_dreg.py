"""STL and DReG: gradients through the draws alone, for which a guide of several sites runs twice."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from every_objective import OBJECTIVES
from exact_bounds import check_unbiased, quadrature
from gaussian_pairs import Chain, Deep, posterior_chain
from pyro import poutine
from pyro.infer import Trace_ELBO
from registry import data, pair
from torch import nn

import pyro_vae as pv
from pyro_vae.evaluation import references


@pytest.mark.parametrize("make", [lambda: pv.STL(), lambda: pv.DReG(4), lambda: pv.STL(3)])
@pytest.mark.parametrize("order", [("z2", "z1"), ("z1", "z2")], ids=["top-down", "bottom-up"])
def test_the_guide_s_gradient_has_no_variance_at_the_exact_posterior(make, order):
    shallow_model, shallow = references.linear_gaussian(width=3, dim=1)
    references.set_to_posterior(shallow_model, shallow)
    deep_model = Deep()
    deep = posterior_chain(deep_model, *order)
    x = torch.randn(5, 3, dtype=torch.float64)
    for model, guide in ((shallow_model, shallow), (deep_model, deep)):
        norms = []
        for elbo in (make(), Trace_ELBO()):
            loss = elbo.differentiable_loss(model, guide, x)
            grads = torch.autograd.grad(loss, list(guide.parameters()))
            norms.append(float(torch.cat([g.flatten() for g in grads]).norm()))
        assert norms[0] < 1e-12 < 0.1 < norms[1]


@pytest.mark.parametrize("name", ["STL", "DReG"])
def test_a_shared_parameter_keeps_its_gradient_in_the_model(name):
    elbo, alpha = OBJECTIVES[name]
    model, guide = references.linear_gaussian(width=2, dim=1)
    references.set_to_posterior(model, guide, spread=1.3)
    with torch.no_grad():
        model.decoder[0].bias.copy_(guide.encoder[0].bias)
    guide.encoder[0].bias = model.decoder[0].bias
    x = torch.randn(2, 2, dtype=torch.float64)
    check_unbiased(elbo, model, guide, x, quadrature(model, guide, x, alpha=alpha), copies=400)


def test_a_second_run_of_the_guide_moves_no_buffer():
    norm = nn.BatchNorm1d(3).double()
    model, guide = Deep(), Chain("z2", "z1", norm)
    pv.STL().differentiable_loss(model, guide, torch.randn(8, 3, dtype=torch.float64))
    assert norm.num_batches_tracked == 1


def test_noise_besides_the_latents_is_refused_where_the_guide_runs_twice():
    model, guide = Deep(), Chain("z2", "z1", nn.Dropout(0.5))
    x = torch.randn(8, 3, dtype=torch.float64)
    for elbo in (pv.STL(), pv.DReG(2)):
        with pytest.raises(ValueError, match="Dropout, say"):
            elbo.differentiable_loss(model, guide, x)
    pv.IWAE(2).differentiable_loss(model, guide, x)
    pv.STL().differentiable_loss(model, guide.eval(), x)
    # a guide of one site runs once
    model, guide = pair()
    guide.encoder.append(nn.Identity())
    guide.encoder.insert(0, nn.Dropout(0.5))
    pv.STL().differentiable_loss(model, guide, data())


def test_several_weights_are_refused_by_dreg():
    def latents():
        pyro.sample("a", dist.Normal(torch.zeros(()), 1.0))
        with poutine.scale(scale=0.5):
            pyro.sample("b", dist.Normal(torch.zeros(()), 1.0))

    def guide(x):
        with pyro.plate("data", len(x)):
            latents()

    def model(x):
        with pyro.plate("data", len(x)):
            latents()
            pyro.sample("x", dist.Normal(torch.zeros(()), 1.0), obs=x)

    with pytest.raises(ValueError, match=r"expected one weight for all, got \{'a': 1.0, 'b': 0.5\}"):
        pv.DReG(2).differentiable_loss(model, guide, torch.zeros(3))
