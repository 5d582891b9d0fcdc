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
from pyro.nn import PyroModule
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


@pytest.mark.parametrize("make", [pv.STL, lambda: pv.DReG(2, vectorize_particles=False)])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_second_run_of_the_guide_moves_no_buffer_and_spoils_no_backward_pass(make, compiled):
    x = torch.randn(8, 3, dtype=torch.float64)
    found = []
    for track in (True, False):  # without statistics there is no buffer that could move
        torch.manual_seed(1)
        norm = nn.BatchNorm1d(3, track_running_stats=track, momentum=1.0).double()
        elbo, model, guide = make(), Deep(), Chain("z2", "z1", norm)
        svi = pv.SVI(
            model,
            guide,
            torch.optim.SGD(pv.parameters(model, guide), lr=0.0),
            loss=pv.CompiledELBO(elbo, backend="eager") if compiled else elbo,
        )
        torch.manual_seed(2)
        svi.step(x)
        if track:
            assert norm.num_batches_tracked == elbo.num_particles
            torch.testing.assert_close(norm.running_mean, x.mean(0))
        found.append([p.grad for p in pv.parameters(model, guide)])
    torch.testing.assert_close(*found)


class TwoFlows(PyroModule):
    """q(z2 | x) q(z1 | z2, x), each a normalising flow."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(3, 12), pv.FlowNormal(2, hidden=4, context=8))
        self.second = nn.Sequential(nn.Linear(3 + 2, 12), pv.FlowNormal(2, hidden=4, context=8))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", self.first(x))
            x = x.expand(*z2.shape[:-1], 3)
            pyro.sample("z1", self.second(torch.cat([x, z2], -1)))


def two_normals(x):
    with pyro.plate("data", len(x)):
        z2 = pyro.sample("z2", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        z1 = pyro.sample("z1", dist.Normal(z2, 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z1.sum(-1, keepdim=True), torch.ones(3)).to_event(1), obs=x)


@pytest.mark.parametrize("make", [pv.STL, lambda: pv.DReG(1)])
def test_a_guide_of_two_flows_keeps_what_its_backward_pass_needs(make):
    guide, x = TwoFlows(), torch.randn(8, 3)
    for p in guide.parameters():  # a flow begins as the identity
        nn.init.normal_(p, std=0.3)
    torch.manual_seed(3)
    make().differentiable_loss(two_normals, guide, x).backward()
    found = [p.grad for p in guide.parameters()]
    # The gradient of the loss without the score, the gradient of log q at fixed draws
    torch.manual_seed(3)
    loss = Trace_ELBO().differentiable_loss(two_normals, guide, x)
    torch.manual_seed(3)
    fixed = poutine.trace(guide).get_trace(x)
    for _, site in fixed.iter_stochastic_nodes():
        site["value"] = site["value"].detach()
    score = (
        poutine.trace(poutine.replay(guide, fixed)).get_trace(x).log_prob_sum(lambda name, _: name != "data")
    )
    torch.testing.assert_close(found, list(torch.autograd.grad(loss - score, list(guide.parameters()))))


def test_dreg_takes_a_latent_whose_posterior_is_not_trained():
    class Second(TwoFlows):
        def forward(self, x):
            with pyro.plate("data", len(x)):
                z2 = pyro.sample("z2", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                x = x.expand(*z2.shape[:-1], 3)
                pyro.sample("z1", self.second(torch.cat([x, z2], -1)))

    guide = Second()
    pv.DReG(2).differentiable_loss(two_normals, guide, torch.randn(8, 3)).backward()
    assert all(p.grad.isfinite().all() for p in guide.second.parameters())


class Shared(nn.Module):
    """Adds the mean over the batch: any layer that mixes data points."""

    def forward(self, h):
        return h + h.mean(-2, keepdim=True)


@pytest.mark.parametrize("mix", [lambda: nn.BatchNorm1d(3), Shared])
def test_dreg_refuses_data_points_that_depend_on_each_other_s_latents(mix):
    x = torch.randn(6, 3)
    model, guide = references.linear_gaussian(width=3, dim=2)
    model, guide = model.float(), guide.float()
    model.decoder.insert(1, mix())

    def gradient_of(elbo):
        elbo.differentiable_loss(model, guide, x).backward()

    with pytest.raises(ValueError, match="each data point depends only on its own latents"):
        gradient_of(pv.DReG(2))
    svi = pv.SVI(model, guide, torch.optim.Adam(pv.parameters(model, guide)), loss=pv.DReG(2))
    with pytest.raises(ValueError, match="BatchNorm in training mode .* To fix: use eval mode"):
        svi.step(x)
    gradient_of(pv.IWAE(2))
    gradient_of(pv.STL(2))
    if mix is not Shared:
        model.decoder[1].eval()
        gradient_of(pv.DReG(2))
        svi.step(x)


def test_dreg_takes_a_batch_norm_that_sees_no_latent_and_refuses_one_that_does():
    x = torch.randn(6, 3, dtype=torch.float64)
    pv.DReG(2).differentiable_loss(Deep(), Chain("z2", "z1", nn.BatchNorm1d(3).double()), x).backward()

    class Mixing(Chain):
        def forward(self, x):
            with pyro.plate("data", len(x)):
                z2 = pyro.sample("z2", dist.Normal(x @ self.w[0], 1.0))
                pyro.sample("z1", dist.Normal(z2 - z2.mean(-1, keepdim=True), 1.0))

    with pytest.raises(ValueError, match="each data point depends only on its own latents"):
        pv.DReG(2).differentiable_loss(Deep(), Mixing("z2", "z1"), x)


def test_noise_besides_the_latents_is_refused_where_the_guide_runs_twice():
    model, guide = Deep(), Chain("z2", "z1", nn.Dropout(0.5))
    x = torch.randn(8, 3, dtype=torch.float64)
    for elbo in (pv.STL(), pv.DReG(2)):
        with pytest.raises(ValueError, match="such as Dropout"):
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
