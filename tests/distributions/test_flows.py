"""Coupling flows, as a posterior and as a prior: exact densities."""

import math

import pyro.distributions as dist
import pytest
import torch
from registry import unsettled

import pyro_vae as pv


def linear_network(network, slope, shift, log_scale):
    """Make a network of one input and two outputs linear: t = slope x + shift, s constant."""
    with torch.no_grad():
        for p in network.parameters():
            p.zero_()
        first, last = network.layers
        first.weight[0, -1], first.weight[1, -1] = 1.0, -1.0  # relu(x) - relu(-x) = x
        last.weight[0, 0], last.weight[0, 1] = slope, -slope
        last.bias[0], last.bias[1] = shift, log_scale


def test_an_affine_flow_is_a_gaussian():
    """f(e): e2 <- 1.5 e2 + 0.8 e1 + 0.3, then e1 <- 0.5 e1 - 0.7 e2 - 0.2; z = mu + sigma f(e)."""
    family = pv.FlowNormal(2, steps=1, hidden=4, context=3).double()
    linear_network(family.flow.networks[0], 0.8, 0.3, math.log(1.5))
    linear_network(family.flow.networks[1], -0.7, -0.2, math.log(0.5))
    mu = torch.tensor([0.4, -1.0], dtype=torch.float64, requires_grad=True)
    log_sigma = torch.tensor([-1.2, 0.7], dtype=torch.float64, requires_grad=True)
    sigma = log_sigma.exp()
    first = torch.tensor([[1.0, 0.0], [0.8, 1.5]]).double()
    second = torch.tensor([[0.5, -0.7], [0.0, 1.0]]).double()
    matrix = sigma[:, None] * (second @ first)
    shift = mu + sigma * (second @ torch.tensor([0.0, 0.3]).double() + torch.tensor([-0.2, 0.0]))
    exact = dist.MultivariateNormal(shift, matrix @ matrix.T)

    q = family(torch.cat([mu, log_sigma, torch.randn(3).double()]))
    z = q.sample((20_000,))
    for ours, theirs in zip(
        torch.autograd.grad(q.log_prob(z.clone()).mean(), [mu, log_sigma], retain_graph=True),
        torch.autograd.grad(exact.log_prob(z).mean(), [mu, log_sigma], retain_graph=True),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(q.log_prob(z), exact.log_prob(z))  # by the cache
    torch.testing.assert_close(q.log_prob(z.clone()), exact.log_prob(z))  # by the inverse
    assert ((z.mean(0) - shift).abs() < 5 * z.std(0) / math.sqrt(len(z))).all()
    torch.testing.assert_close(z.T.cov(), matrix @ matrix.T, rtol=0.05, atol=0.02)

    prior = pv.FlowPrior(2, steps=1, hidden=4).double()
    prior.flow.load_state_dict(
        {k: v[:, -1:] if k.endswith("layers.0.weight") else v for k, v in family.flow.state_dict().items()}
    )
    torch.testing.assert_close(prior().log_prob((z - mu) / sigma), exact.log_prob(z) + sigma.log().sum())


@pytest.mark.parametrize("dim", [2, 5])
def test_the_log_determinant_is_that_of_the_jacobian(dim):
    flow = unsettled(pv.CouplingFlow(dim, steps=2, hidden=7, context=3).double())
    context, x = torch.randn(3).double(), torch.randn(dim).double()

    def forward(x):
        for transform in flow(context):
            x = transform(x)
        return x

    total, y = torch.zeros(()).double(), x
    for transform in flow(context):
        total, y = total + transform.log_abs_det_jacobian(y, transform(y)), transform(y)
    jacobian = torch.autograd.functional.jacobian(forward, x)
    assert (jacobian.abs() > 1e-9).all()  # every dimension moves by every other
    torch.testing.assert_close(total, torch.linalg.slogdet(jacobian)[1])
    for transform in reversed(flow(context)):
        y = transform.inv(y)
    torch.testing.assert_close(y, x)


def test_a_flow_follows_its_parameters():
    """Pyro's transforms cache the output for their last input tensor."""
    prior, z = pv.FlowPrior(3), torch.randn(4, 3)
    before = prior().log_prob(z)
    unsettled(prior)
    after = prior().log_prob(z)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, prior().log_prob(z.clone()))


def test_a_flow_under_autocast_is_a_density():
    prior, z = unsettled(pv.FlowPrior(2, 1, 8)), torch.randn(6, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        p = prior()
        draws = p.sample((5,))
        assert p.log_prob(z).dtype == draws.dtype == torch.float32
        for transform in prior.flow():
            y = transform(z)
            jacobian = torch.stack([torch.autograd.functional.jacobian(transform, row) for row in z])
            ours = transform.log_abs_det_jacobian(z, y)
            torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], ours, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pv.CouplingFlow(2, context=-1), "context: expected a whole number of at least 0, got -1"),
    ],
)
def test_invalid_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
