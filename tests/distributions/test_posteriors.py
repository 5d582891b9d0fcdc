"""Posteriors, and their KL against the closed forms."""

import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv


def test_diag_normal_is_mu_plus_sigma_eps():
    mean, log_sigma = torch.randn(4, 3), torch.randn(4, 3)
    q = pv.DiagNormal()(torch.cat([mean, log_sigma], -1))
    torch.manual_seed(1)
    z = q.rsample()
    torch.manual_seed(1)
    eps = torch.randn(4, 3)
    torch.testing.assert_close(z, mean + log_sigma.exp() * eps)


def test_kl_of_a_diag_normal_is_the_closed_form():
    mean, log_sigma = torch.randn(4, 3), torch.randn(4, 3)
    q = pv.DiagNormal()(torch.cat([mean, log_sigma], -1))
    kl = torch.distributions.kl_divergence(q, pv.StandardNormal(3)())
    variance = (2 * log_sigma).exp()
    expected = 0.5 * (-variance.log().sum(-1) - 3 + variance.sum(-1) + mean.square().sum(-1))
    torch.testing.assert_close(kl, expected)


def test_kl_of_a_full_normal_is_the_closed_form():
    family = pv.FullNormal()
    q = family(torch.randn(4, family.num_features(3), dtype=torch.float64))
    loc, scale = torch.randn(3, dtype=torch.float64), torch.rand(3, dtype=torch.float64) + 0.5
    p = dist.Normal(loc, scale).to_event(1)
    s1, s2 = q.covariance_matrix, torch.diag(scale**2)
    gap = (loc - q.loc).unsqueeze(-1)
    expected = 0.5 * (
        torch.logdet(s2)
        - torch.logdet(s1)
        - 3
        + (torch.linalg.inv(s2) @ s1).diagonal(dim1=-2, dim2=-1).sum(-1)
        + (gap.mT @ torch.linalg.inv(s2) @ gap).flatten()
    )
    torch.testing.assert_close(torch.distributions.kl_divergence(q, p), expected)
    mvn = dist.MultivariateNormal(loc, scale_tril=torch.diag(scale))
    torch.testing.assert_close(torch.distributions.kl_divergence(q, mvn), expected)


def test_full_normal_without_its_lower_entries_is_diag_normal():
    features = torch.randn(4, 6)
    full = pv.FullNormal()(torch.cat([features, torch.zeros(4, 3)], -1))
    diag = pv.DiagNormal()(features)
    z = torch.randn(4, 3)
    torch.testing.assert_close(full.log_prob(z), diag.log_prob(z))


def test_full_normal_reads_its_factor_row_by_row():
    log_sigma = torch.tensor([1.0, 2.0, 3.0]).log()
    q = pv.FullNormal()(torch.cat([torch.tensor([1.0, 2.0, 3.0]), log_sigma, torch.tensor([4.0, 5.0, 6.0])]))
    expected = torch.tensor([[1.0, 0.0, 0.0], [8.0, 2.0, 0.0], [15.0, 18.0, 3.0]])
    torch.testing.assert_close(q.scale_tril, expected)
    torch.testing.assert_close(q.loc, torch.tensor([1.0, 2.0, 3.0]))


def test_a_flow_normal_starts_as_a_diag_normal():
    z, features = torch.randn(4, 3), torch.randn(4, 6 + 5)
    q = pv.FlowNormal(3, context=5)(features)
    torch.testing.assert_close(q.log_prob(z), pv.DiagNormal()(features[:, :6]).log_prob(z))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: pv.FlowNormal(3).num_features(2),
            r"an event of 3 dimensions, got 2. To fix: write FlowNormal\(2\)",
        ),
        (lambda: pv.FlowNormal(3)(torch.zeros(5, 6)), r"\(\*batch, 38\).*got \(5, 6\)"),
    ],
)
def test_invalid_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
