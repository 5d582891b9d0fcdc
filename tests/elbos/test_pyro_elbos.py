"""Pyro's ELBOs against the closed forms of the linear-Gaussian VAE."""

import math

import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch.distributions import kl_divergence

import pyro_vae as pv
from pyro_vae.evaluation import references

PARTICLES = 4_000


@pytest.fixture
def case():
    model, guide = references.linear_gaussian()
    return model, guide, torch.randn(4, 5, dtype=torch.float64)


def test_the_evidence_exceeds_the_elbo_by_the_kl_to_the_posterior(case):
    model, guide, x = case
    gap = references.evidence(model, x) - references.elbo(model, guide, x)
    posterior = references.posterior(model, x)
    q = guide.encoder(x)
    q = torch.distributions.MultivariateNormal(q.mean, torch.diag_embed(q.variance))
    torch.testing.assert_close(gap, kl_divergence(q, posterior))


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
def test_value_and_gradient_are_the_closed_form(case, elbo):
    """Within five Monte Carlo standard errors, which a wrong factor would break a hundred times."""
    model, guide, x = case
    trained = pv.parameters(model, guide)
    exact = -references.elbo(model, guide, x).sum()
    exact_grads = torch.cat([g.flatten() for g in torch.autograd.grad(exact, trained)])

    estimator = elbo(max_plate_nesting=1)
    losses, grads = [], []
    for _ in range(PARTICLES // 10):
        loss = estimator.differentiable_loss(model, guide, x)
        losses.append(loss.detach())
        grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)]))
    losses, grads = torch.stack(losses), torch.stack(grads)
    error = losses.std() / math.sqrt(len(losses))
    assert (losses.mean() - exact).abs() < 5 * error
    error = grads.std(0) / math.sqrt(len(grads))
    assert ((grads.mean(0) - exact_grads).abs() < 5 * error + 1e-9).all()
    # the bound means something: it is small against what it bounds
    assert error.norm() < 0.1 * exact_grads.norm()


def test_mean_field_kl_is_exact(case):
    """A mean-field loss without its KL is the reconstruction of the same z."""
    model, guide, x = case
    kl = references.kl(guide, x)
    torch.manual_seed(3)
    loss = TraceMeanField_ELBO().differentiable_loss(model, guide, x)
    torch.manual_seed(3)
    z = guide.encoder(x).rsample()
    reconstruction = model.decoder(z).log_prob(x).sum()
    torch.testing.assert_close(loss, kl.sum() - reconstruction)


def test_full_normal_guide_has_an_analytic_kl():
    """Two draws differ by their reconstructions alone: the KL term has no noise."""
    width, dim = 5, 2
    family = pv.FullNormal()
    model, _ = references.linear_gaussian(width, dim)
    encoder = torch.nn.Linear(width, family.num_features(dim))
    guide = pv.Guide(torch.nn.Sequential(encoder, family).double())
    x = torch.randn(4, width, dtype=torch.float64)
    kl = kl_divergence(
        guide.encoder(x),
        torch.distributions.MultivariateNormal(torch.zeros(dim).double(), torch.eye(dim).double()),
    )
    for seed in (0, 1):
        torch.manual_seed(seed)
        loss = TraceMeanField_ELBO().differentiable_loss(model, guide, x)
        torch.manual_seed(seed)
        z = guide.encoder(x).rsample()
        torch.testing.assert_close(loss, kl.sum() - model.decoder(z).log_prob(x).sum())
