"""Priors: densities that are those of their draws, and what each of them is."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from registry import POSTERIORS, PRIORS, data, encoder, pair
from torch import nn

import pyro_vae as pv

# Every prior, and a VampPrior of every posterior.
each_prior = pytest.mark.parametrize(
    ("name", "posterior"),
    [
        *((name, "diag-normal") for name in PRIORS),
        *(("vamp", name) for name in POSTERIORS if name != "diag-normal"),
    ],
)


def make_prior(name, posterior):
    return PRIORS[name](3, encoder(POSTERIORS[posterior](3), dim=3))


@each_prior
def test_priors(name, posterior):
    prior = make_prior(name, posterior)
    p = prior()
    assert p.batch_shape == ()
    assert len(p.event_shape) == 1
    assert p.log_prob(p.sample((6,))).shape == (6,)
    assert prior.double()().sample().dtype == torch.float64
    assert prior().expand((2,)).sample((7,)).shape == (7, 2, 3)


@each_prior
def test_the_density_of_a_prior_is_that_of_its_draws(name, posterior):
    """By importance sampling from a wide Gaussian: the integral is one, the moments are those of draws."""
    p = make_prior(name, posterior).double()()
    draws = p.sample((40_000,))
    assert draws.shape == (40_000, 3)
    wide = dist.MultivariateNormal(draws.mean(0), 3 * draws.T.cov())
    z = wide.sample((40_000,))
    weights = (p.log_prob(z) - wide.log_prob(z)).exp()
    for function in (lambda z: torch.ones_like(z), lambda z: z, lambda z: z**2, lambda z: z * z.roll(1, -1)):
        ours, theirs = function(draws), weights[:, None] * function(z)
        error = ((ours.var(0) + theirs.var(0)) / len(z)).sqrt()
        assert (error < 0.1 * (1 + ours.mean(0).abs())).all()
        assert ((ours.mean(0) - theirs.mean(0)).abs() < 5 * error).all()


def test_standard_normal_is_standard():
    z = torch.randn(4, 3)
    expected = -0.5 * z.square().sum(-1) - 1.5 * math.log(2 * math.pi)
    torch.testing.assert_close(pv.StandardNormal(3)().log_prob(z), expected)


def test_a_mixture_is_that_of_torch():
    prior = pv.MixturePrior(3, 4)
    with torch.no_grad():
        prior.logits.normal_()
        prior.log_sigma.normal_()
        prior.log_sigma[0] = math.log(1e-3)  # where float32 would lose nats
    z = torch.cat([torch.randn(5, 3), prior.mean[:1] + 1e-3])
    components = dist.Normal(prior.mean, prior.log_sigma.exp()).to_event(1)
    expected = dist.MixtureSameFamily(dist.Categorical(logits=prior.logits), components)
    ours, theirs = (p.log_prob(z) for p in (prior(), expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(prior().mean, expected.mean)
    for p in prior.parameters():
        (a,), (b,) = (
            torch.autograd.grad(log_prob.sum(), p, retain_graph=True) for log_prob in (ours, theirs)
        )
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    assert prior().expand((6,)).log_prob(z).shape == (6,)
    with pytest.raises(ValueError, match="support|shape|event"):
        prior().log_prob(z[:, :2])


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_a_vamp_prior_is_the_mean_of_the_posteriors_at_its_inputs(posterior):
    q = encoder(POSTERIORS[posterior](2))
    u, z = torch.rand(4, 6), torch.randn(5, 2)
    each = torch.stack([q(u[k]).log_prob(z) for k in range(4)])
    expected = each.exp().mean(0).log()
    torch.testing.assert_close(pv.VampPrior(q, u)().log_prob(z), expected, rtol=1e-4, atol=1e-4)


def test_a_vamp_prior_shares_the_encoder_and_counts_it_once():
    model, guide = (program.double() for program in pair(prior="vamp"))
    x = data().double()
    assert model.prior.encoder is guide.encoder
    alone = [*model.decoder.parameters(), *guide.parameters(), model.prior.pseudo_inputs]
    assert len(pv.parameters(model, guide)) == len(alone)
    assert set(map(id, pv.parameters(model, guide))) == set(map(id, alone))
    svi = pv.SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), loss=Trace_ELBO())
    svi.step(x)
    assert model.prior.encoder is guide.encoder
    # The gradient has a part from each place.
    weight = guide.encoder[0][0].weight
    kl = guide.encoder(x).log_prob(torch.zeros(2)).sum() - model.prior().log_prob(torch.zeros(2)) * len(x)
    (both,) = torch.autograd.grad(kl, weight)
    posterior = guide.encoder(x).log_prob(torch.zeros(2)).sum()
    (one,) = torch.autograd.grad(posterior, weight)
    assert not torch.allclose(both, one)


def test_pseudo_inputs_are_a_copy():
    x = torch.rand(3, 6)
    prior = pv.VampPrior(nn.Sequential(pv.MLP(6, 4), pv.DiagNormal()), x)
    prior.pseudo_inputs.data.zero_()
    assert x.all()


def test_a_flow_prior_starts_as_a_standard_normal():
    z = torch.randn(4, 3)
    torch.testing.assert_close(pv.FlowPrior(3)().log_prob(z), pv.StandardNormal(3)().log_prob(z))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pv.MixturePrior(2, 0), "MixturePrior, components: expected a positive whole number, got 0"),
        (lambda: pv.VampPrior(nn.Identity(), torch.rand(0, 6)), r"K > 0 pseudo-inputs.*\(0, 6\)"),
        (lambda: pv.VampPrior(nn.Identity(), torch.ones(3, 6).byte()), "torch.uint8.*pass some data"),
        (
            lambda: pv.VampPrior(nn.Identity(), torch.rand(3, 6).numpy()),
            r"VampPrior, pseudo_inputs: .* got numpy.ndarray. To fix: torch.from_numpy\(pseudo_inputs\).f",
        ),
        (
            lambda: pv.VampPrior(nn.Identity(), [torch.rand(6)]),
            "got list. To fix: torch.stack",
        ),
        (lambda: pv.VampPrior(nn.Identity(), None), "got None. To fix: pass a tensor"),
        (
            lambda: pv.FlowPrior(1),
            "dim: expected .* at least 2, got 1.*one dimension has no flow",
        ),
        (lambda: pv.FlowPrior(2, steps=0), "steps: expected a positive whole number, got 0"),
    ],
)
def test_invalid_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
