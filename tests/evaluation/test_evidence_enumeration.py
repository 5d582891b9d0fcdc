"""Evidence with discrete sites that are summed out of the model."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from mixture_pairs import CENTRES, PARALLEL, WEIGHTS, Mixture, MixtureGuide, components

import pyro_vae as pv


def test_an_enumerated_site_is_summed_out_exactly():
    x = 2 * torch.randn(6)
    model, guide = Mixture(), MixtureGuide()
    estimate = pv.log_evidence(model, guide, x, 20_000)
    assert ((estimate.values - components(x).logsumexp(-1)).abs() < 5 * estimate.standard_error).all()
    assert estimate.standard_error.max() < 0.02
    # the terms, at the z that was drawn
    torch.manual_seed(3)
    terms = pv.elbo_terms(model, guide, x)
    torch.manual_seed(3)
    z = torch.normal(x / 2, 2.0)
    prior = WEIGHTS.log() + dist.Normal(CENTRES, 0.5).log_prob(z[:, None])
    joint = prior + dist.Normal(z[:, None] + torch.arange(3), 1.0).log_prob(x[:, None])
    kl = dist.Normal(x / 2, 2.0).log_prob(z) - prior.logsumexp(-1)
    torch.testing.assert_close(terms.kl, kl)
    torch.testing.assert_close(terms.reconstruction, joint.logsumexp(-1) - prior.logsumexp(-1))


def test_a_single_data_point_and_an_empty_guide():
    """Without a latent in the guide there is nothing to sample: one draw is exact."""

    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(WEIGHTS), infer=PARALLEL)
            pyro.sample("x", dist.Normal(CENTRES[k] + k, math.sqrt(1.25)), obs=x)

    for x in (torch.randn(5), torch.randn(1)):
        estimate = pv.log_evidence(model, lambda x: None, x, 2)
        torch.testing.assert_close(estimate.values, components(x).logsumexp(-1))


def test_a_mixture_with_a_plate_right_of_the_data():
    """Sites of a data point have a dimension of size 1 on the right, with particles and without."""

    def model(x):
        with pyro.plate("data", len(x), dim=-2):
            k = pyro.sample("k", dist.Bernoulli(0.3), infer=PARALLEL)
            with pyro.plate("pixels", 2, dim=-1):
                pyro.sample("x", dist.Normal(3 * k, 1.0), obs=x)

    x = 2 * torch.randn(4, 2)
    each = torch.stack([dist.Normal(3.0 * k, 1.0).log_prob(x).sum(-1) for k in range(2)])
    exact = (each + torch.tensor([[0.7], [0.3]]).log()).logsumexp(0)
    for rows in (4, 1):
        for samples in (1, 5):
            found = pv.log_evidence(model, lambda x: None, x[:rows], samples).values
            torch.testing.assert_close(found, exact[:rows])
        torch.testing.assert_close(pv.elbo_terms(model, lambda x: None, x[:rows]).elbo, exact[:rows])


def test_enumerated_sites_of_a_nested_plate_are_summed_one_by_one():
    """Each part has a k of its own beside a common j: sum_j p(j) prod_i sum_k p(k) p(x_i | j, k)."""

    def model(x):
        with pyro.plate("data", len(x), dim=-2):
            j = pyro.sample("j", dist.Bernoulli(0.3), infer=PARALLEL)
            with pyro.plate("parts", 3, dim=-1):
                k = pyro.sample("k", dist.Categorical(WEIGHTS), infer=PARALLEL)
                pyro.sample("x", dist.Normal(CENTRES[k] + k + j, math.sqrt(1.25)), obs=x)

    x = torch.randn(4, 3)
    parts = [components((x - j).flatten()).logsumexp(-1).view(4, 3).sum(-1) for j in (0, 1)]
    exact = torch.logaddexp(parts[0] + math.log(0.7), parts[1] + math.log(0.3))
    torch.testing.assert_close(pv.log_evidence(model, lambda x: None, x, 3).values, exact)


def test_an_enumerated_chain_with_recycled_dimensions():
    """A hidden Markov model of four steps against the forward algorithm."""
    transition = torch.tensor([[0.9, 0.1], [0.4, 0.6]])

    def model(x):
        with pyro.plate("data", len(x)):
            k = 0
            for t in pyro.markov(range(4)):
                k = pyro.sample(f"k{t}", dist.Categorical(transition[k]), infer=PARALLEL)
                pyro.sample(f"x{t}", dist.Normal(2.0 * k, 1.0), obs=x[:, t])

    x = torch.randn(3, 4)
    forward = torch.tensor([1.0, 0.0])
    for t in range(4):
        likelihood = dist.Normal(torch.tensor([0.0, 2.0]), 1.0).log_prob(x[:, t, None]).exp()
        forward = forward @ transition * likelihood
    estimate = pv.log_evidence(model, lambda x: None, x, 2)
    torch.testing.assert_close(estimate.values, forward.sum(-1).log())


def test_a_masked_data_point_of_a_mixture_has_evidence_1():
    x, mask = torch.randn(6), torch.arange(6) % 2 == 0
    masked = [pyro.poutine.mask(program, mask=mask) for program in (Mixture(), MixtureGuide())]
    estimate = pv.log_evidence(*masked, x, 10_000)
    expected = torch.where(mask, components(x).logsumexp(-1), torch.zeros(6))
    assert ((estimate.values - expected).abs() < 5 * estimate.standard_error + 1e-5).all()


@pytest.mark.parametrize(
    ("prior", "mark"),
    [
        (dist.Bernoulli(0.5), {}),
        (dist.Bernoulli(0.5), {"enumerate": "sequential"}),
        (dist.Poisson(1.0), PARALLEL),
    ],
)
def test_a_latent_that_nobody_samples_or_sums_is_refused(prior, mark):
    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", prior, infer=mark)
            pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    for evaluate in (lambda *pair: pv.log_evidence(*pair, 5), pv.elbo_terms):
        with pytest.raises(
            ValueError, match=r"expected the same.*got \['k'\] only in the model and none only.*enumerate"
        ):
            evaluate(model, lambda x: None, torch.randn(3))
