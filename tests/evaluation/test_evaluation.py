import math
import subprocess
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from registry import LIKELIHOODS, POSTERIORS, data, pair
from torch import nn

import pyro_vae as pv
from pyro_vae.evaluation import evidence as evaluation
from pyro_vae.evaluation import references
from pyro_vae.programs import plates as layouts


@pytest.fixture
def linear():
    model, guide = references.linear_gaussian()
    references.set_to_posterior(model, guide, spread=1.3)
    return model, guide, torch.randn(50, 5, dtype=torch.float64)


def test_log_evidence_is_the_evidence(linear):
    model, guide, x = linear
    estimate = pv.log_evidence(model, guide, x, 20_000)
    exact = references.evidence(model, x)
    assert estimate.values.shape == estimate.standard_error.shape == (50,)
    assert ((estimate.values - exact).abs() < 5 * estimate.standard_error).all()
    assert estimate.standard_error.max() < 0.02
    assert estimate.mean().item() == pytest.approx(exact.mean().item(), abs=0.02)


def test_with_the_exact_posterior_one_sample_is_enough(linear):
    model, _, x = linear

    class Posterior(PyroModule):
        def forward(self, x):
            with pyro.plate("data", len(x)):
                q = references.posterior(model, x)
                pyro.sample("z", dist.MultivariateNormal(q.mean, q.covariance_matrix))

    for num_samples in (2, 151):  # the second in two runs of 76, of which one draw is too many
        estimate = pv.log_evidence(model, Posterior(), x, num_samples)
        torch.testing.assert_close(estimate.values, references.evidence(model, x))
        zero = torch.zeros_like(estimate.values)
        torch.testing.assert_close(estimate.standard_error, zero, atol=1e-6, rtol=0)


def test_the_bound_rises_with_the_samples(linear):
    model, guide, x = linear
    elbo = sum(pv.elbo_terms(model, guide, x).elbo.mean() for _ in range(20)) / 20
    few = sum(pv.log_evidence(model, guide, x, 5).mean() for _ in range(20)) / 20
    many = pv.log_evidence(model, guide, x, 2000).mean()
    assert elbo < few < many


def test_the_standard_error_is_the_spread_of_repetitions(linear):
    model, guide, x = linear
    runs = [pv.log_evidence(model, guide, x, 1000) for _ in range(60)]
    spread = torch.stack([run.values for run in runs]).std(0)
    told = torch.stack([run.standard_error for run in runs]).mean(0)
    assert 0.8 < (spread / told).median() < 1.25


def test_one_sample_has_no_standard_error(linear):
    estimate = pv.log_evidence(*linear, 1)
    assert estimate.values.isfinite().all()
    assert estimate.standard_error.isnan().all()


def test_chunks_do_not_show(linear, monkeypatch):
    model, guide, x = linear
    whole = pv.log_evidence(model, guide, x, 1000)
    monkeypatch.setattr(evaluation, "_ROWS", 64)
    monkeypatch.setattr(evaluation, "_SAMPLES", 24)  # 42 runs of 24, of which the last counts 16
    parts = pv.log_evidence(model, guide, x, 1000)
    assert ((whole.values - parts.values).abs() < 6 * whole.standard_error).all()


@pytest.mark.filterwarnings("default")  # torch 2.11's compiler uses what torch deprecates
def test_compiled_log_evidence_has_the_numbers_of_eager():
    """With a whole chunk that is compiled, a last one of fewer data, and a draw too many."""
    model, guide = pair(width=64, hidden=40)
    x = data(width=64, size=110)
    estimates = []
    for compiled in (False, True):
        torch.manual_seed(0)
        estimates.append(pv.log_evidence(model, guide, x, 151, compiled=compiled))
    for ours, theirs in zip(*estimates, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_log_evidence_of_reduced_precision_is_near():
    model, guide = pair(width=64, hidden=40)
    x = data(width=64, size=110)
    full = pv.log_evidence(model, guide, x, 2000)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        reduced = pv.log_evidence(model, guide, x, 2000)
    assert reduced.values.dtype == torch.float32
    error = (full.standard_error.square() + reduced.standard_error.square()).mean().sqrt()
    assert abs(full.mean() - reduced.mean()) < 0.02 + 5 * error / math.sqrt(len(x))


def test_what_cannot_be_captured_is_said_before_it_is_weighed():
    model, guide = pair()

    class Branching(PyroModule):
        def __init__(self):
            super().__init__()
            self.guide = guide

        def forward(self, x):
            z = self.guide(x)
            return z if z.sum() > 0 else -z

    with pytest.raises(
        ValueError,
        match=r"expected tensor operations alone.*cannot capture: test_evidence\.py, line .*z\.sum\(\) > 0",
    ):
        pv.log_evidence(model, Branching(), data(), 100, compiled=True)


def test_elbo_terms_are_the_closed_form(linear):
    model, guide, x = linear
    exact = {"reconstruction": references.reconstruction(model, guide, x), "kl": references.kl(guide, x)}
    runs = [pv.elbo_terms(model, guide, x) for _ in range(1000)]
    for name, expected in exact.items():
        values = torch.stack([getattr(run, name) for run in runs]).double()
        error = values.std(0) / math.sqrt(len(runs))
        assert ((values.mean(0) - expected).abs() < 5 * error).all()
    torch.testing.assert_close(runs[0].elbo, runs[0].reconstruction - runs[0].kl)


def test_a_model_without_latents_has_no_kl():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1), obs=x)

    terms = pv.elbo_terms(model, lambda x: None, torch.randn(4, 3))
    assert torch.equal(terms.kl, torch.zeros(4))
    assert torch.equal(terms.elbo, terms.reconstruction)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("posterior", POSTERIORS)
def test_every_pair_is_evaluated(likelihood, posterior):
    model, guide = pair(likelihood, posterior)
    x = data(likelihood)
    before = [p.clone() for p in pv.parameters(model, guide)]
    assert pv.log_evidence(model, guide, x, 10).values.shape == (8,)
    assert pv.elbo_terms(model, guide, x).elbo.shape == (8,)
    assert pv.generate(model, x)["x"].sample().shape == x.shape
    assert pv.reconstruct(model, guide, x)["x"].mean.shape == x.shape
    torch.testing.assert_close(before, pv.parameters(model, guide), rtol=0, atol=0)
    assert model.training
    assert not pyro.get_param_store()


class TwoLayers(PyroModule):
    """p(z2) p(z1 | z2) p(x | z1), all scalar and linear-Gaussian: x ~ N(0, 3)."""

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(0.0, 1.0))
            z1 = pyro.sample("z1", dist.Normal(z2, 1.0))
            pyro.sample("x", dist.Normal(z1, 1.0), obs=x)


class TwoLayerGuide(PyroModule):
    def forward(self, x):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(0.5 * x, 1.0))
            pyro.sample("z2", dist.Normal(0.5 * z1, 1.0))


def test_several_latent_sites_scales_and_masks():
    x = torch.randn(6)
    exact = dist.Normal(0.0, math.sqrt(3.0)).log_prob(x)
    model, guide = TwoLayers(), TwoLayerGuide()
    estimate = pv.log_evidence(model, guide, x, 40_000)
    assert ((estimate.values - exact).abs() < 5 * estimate.standard_error).all()
    assert estimate.standard_error.max() < 0.03
    # a KL weight or a subsampled plate does not change the evidence of the model
    scaled = pyro.poutine.scale(model, scale=0.1), pyro.poutine.scale(guide, scale=0.1)
    estimate = pv.log_evidence(*scaled, x, 40_000)
    assert ((estimate.values - exact).abs() < 5 * estimate.standard_error).all()
    # a masked datum has nothing to say: its evidence is 1
    mask = torch.arange(6) % 2 == 0
    masked = pyro.poutine.mask(model, mask=mask), pyro.poutine.mask(guide, mask=mask)
    estimate = pv.log_evidence(*masked, x, 40_000)
    expected = torch.where(mask, exact, torch.zeros(6))
    assert ((estimate.values - expected).abs() < 5 * estimate.standard_error + 1e-5).all()


class Subsampled(PyroModule):
    def __init__(self, program):
        super().__init__()
        self.program = program

    def forward(self, x):
        with pyro.plate("data", 1000, subsample_size=len(x)):
            return self.program(x)


def test_a_subsampled_data_plate_is_each_datum_s_own():
    class Latent(nn.Module):
        def forward(self, x):
            return pyro.sample("z", dist.Normal(x / 2, 0.8))

    class Joint(nn.Module):
        def forward(self, x):
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
            return pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.randn(10)
    estimate = pv.log_evidence(Subsampled(Joint()), Subsampled(Latent()), x, 20_000)
    exact = dist.Normal(0.0, math.sqrt(2.0)).log_prob(x)
    assert ((estimate.values - exact).abs() < 5 * estimate.standard_error).all()


def test_several_arguments_are_cut_alike():
    """p(x | z, y): the second tensor goes with the data, the third is everybody's."""

    class Conditional(PyroModule):
        def forward(self, x, y, spread):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(y, 1.0))
                pyro.sample("x", dist.Normal(z, spread), obs=x)

    class Encoder(PyroModule):
        def forward(self, x, y, spread):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal((x + y) / 2, 1.0))

    x, y, spread = torch.randn(5000), torch.randn(5000), torch.tensor([2.0])
    estimate = pv.log_evidence(Conditional(), Encoder(), (x, y, spread), 100)
    exact = dist.Normal(y, math.sqrt(5.0)).log_prob(x)
    assert estimate.mean().item() == pytest.approx(exact.mean().item(), abs=0.02)


class Images(PyroModule):
    """A convolutional encoder, which a plate of particles on the left would break."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 4, 4), nn.Flatten(1))
        self.family = pv.DiagNormal()

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.family(self.net(x)))


class ConvModel(PyroModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Unflatten(1, (2, 1, 1)), nn.ConvTranspose2d(2, 1, 4), nn.Flatten(1))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", pv.StandardNormal(2)())
            pyro.sample("x", pv.Bernoulli()(self.net(z)), obs=x)


def test_a_model_without_particle_dimensions_is_evaluated_one_by_one():
    model, guide = ConvModel(), Images()
    x = data(size=3, width=16)
    assert layouts.layout(model, guide, (x,), {}, particles=True).particle_dim is None
    estimate = pv.log_evidence(model, guide, x, 500)
    weights = torch.cat([evaluation._log_weights(model, guide, (x,)) for _ in range(2000)]).detach()
    reference = weights.logsumexp(0) - math.log(2000)
    assert ((estimate.values - reference).abs() < 6 * estimate.standard_error).all()


class BatchNormed(PyroModule):
    """BatchNorm1d reads (particles, B, C) as B channels: silently wrong where B is C."""

    def __init__(self, channels):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, channels), nn.BatchNorm1d(channels), pv.Bernoulli())
        nn.init.normal_(self.net[1].weight)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", pv.StandardNormal(2)())
            pyro.sample("x", self.net(z), obs=x)


def test_a_network_that_is_silently_wrong_on_particles_is_found_out():
    model = BatchNormed(8)
    _, guide = pair(width=8)
    x = data(size=8, width=8)
    assert layouts.layout(model, guide, (x,), {}, particles=True).particle_dim is None
    plain_model, plain_guide = pair(width=8)
    assert layouts.layout(plain_model, plain_guide, (x,), {}, particles=True).particle_dim == -2


def test_generation_ignores_the_data_and_follows_the_prior():
    model, _ = references.linear_gaussian(sigma=0.1)
    x = torch.full((20_000, 5), 7.0, dtype=torch.float64)
    drawn = pv.generate(model, x)["x"].sample()
    weight, bias = model.decoder[0].weight.detach(), model.decoder[0].bias.detach()
    covariance = weight @ weight.T + 0.01 * torch.eye(5)
    torch.testing.assert_close(drawn.mean(0), bias, atol=0.05, rtol=0)
    torch.testing.assert_close(drawn.T.cov(), covariance, atol=0.05, rtol=0.05)


def test_reconstruction_goes_through_the_guide(linear):
    model, guide, x = linear
    torch.manual_seed(2)
    reconstructed = pv.reconstruct(model, guide, x)["x"].mean
    torch.manual_seed(2)
    z = guide.encoder(x).rsample()
    torch.testing.assert_close(reconstructed, model.decoder(z).mean)


def test_a_site_outside_the_data_plate_is_refused():
    def model(x):
        scale = pyro.sample("scale", dist.Gamma(2.0, 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, scale), obs=x)

    def guide(x):
        pyro.sample("scale", dist.Gamma(2.0, 2.0))

    with pytest.raises(ValueError, match="'scale': expected it inside the plate 'data', got the plates none"):
        pv.log_evidence(model, guide, torch.randn(4), 10)


def test_a_data_plate_that_is_looped_over_is_refused():
    """All the data would have one importance weight."""

    def model(x):
        for i in pyro.plate("data", len(x)):
            z = pyro.sample(f"z{i}", dist.Normal(0.0, 1.0))
            pyro.sample(f"x{i}", dist.Normal(z, 1.0), obs=x[i])

    def guide(x):
        for i in pyro.plate("data", len(x)):
            pyro.sample(f"z{i}", dist.Normal(0.5 * x[i], 0.5**0.5))

    x = torch.randn(3)
    for run in (pv.log_evidence, pv.elbo_terms, pv.latent_terms, pv.IWAE(5).loss, pv.FreeBits(0.1).loss):
        with pytest.raises(ValueError, match="'.0': expected the plate 'data' to be a dimension, got a loop"):
            run(model, guide, x)


def test_a_plate_within_a_datum_may_be_looped_over():
    """A mixture, summed out, with two pixels in a loop."""

    def model(x, loop):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            if loop:
                for i in pyro.plate("pixels", 2):
                    pyro.sample(f"x{i}", dist.Normal(k, 1.0), obs=x[:, i])
            else:
                pyro.sample("x", dist.Normal(k.unsqueeze(-1).expand(*k.shape, 2), 1.0).to_event(1), obs=x)

    x = torch.randn(3, 2)
    found = [pv.log_evidence(model, lambda x, loop: None, (x, loop), 1).values for loop in (True, False)]
    torch.testing.assert_close(*found)


def test_a_subsampled_plate_within_a_datum_is_refused():
    def model(x):
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0))
            with pyro.plate("parts", 6, subsample_size=3, dim=-1):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(torch.zeros(1), 1.0))

    with pytest.raises(
        ValueError, match="'x': expected its other plates to be whole, got 'parts' with 3 of 6"
    ):
        pv.log_evidence(model, guide, torch.randn(4, 3), 10)


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


def test_a_single_datum_and_no_guide_at_all():
    """Without a latent in the guide there is nothing to sample: one draw is exact."""

    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(WEIGHTS), infer=PARALLEL)
            pyro.sample("x", dist.Normal(CENTRES[k] + k, math.sqrt(1.25)), obs=x)

    for x in (torch.randn(5), torch.randn(1)):
        estimate = pv.log_evidence(model, lambda x: None, x, 2)
        torch.testing.assert_close(estimate.values, components(x).logsumexp(-1))


def test_a_last_chunk_of_one_datum_has_the_form_of_the_others(monkeypatch):
    monkeypatch.setattr(evaluation, "_ROWS", 4)
    x = torch.randn(5)
    for rows in (x, x[:1]):
        terms = pv.elbo_terms(Mixture(), MixtureGuide(), rows)
        assert [term.shape for term in terms] == 3 * [rows.shape]
        torch.testing.assert_close(terms.elbo, terms.reconstruction - terms.kl)


def test_without_particles_side_by_side_there_are_more_data_at_a_time(monkeypatch):
    monkeypatch.setattr(evaluation, "_ROWS", 64)
    sizes = []

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            if z.dim() > 1:
                raise RuntimeError("one particle at a time")
            sizes.append(len(x))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, math.sqrt(0.5)))  # the posterior

    x = torch.randn(60)
    values = pv.log_evidence(model, guide, x, 16).values
    torch.testing.assert_close(values, dist.Normal(0.0, math.sqrt(2.0)).log_prob(x))
    assert sizes[-16:] == 16 * [60]


def test_a_mixture_with_a_plate_right_of_the_data():
    """The sites of a datum have a dimension of size 1 on the right, with particles and without."""

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


def test_a_masked_datum_of_a_mixture_has_nothing_to_say():
    x, mask = torch.randn(6), torch.arange(6) % 2 == 0
    masked = [pyro.poutine.mask(program, mask=mask) for program in (Mixture(), MixtureGuide())]
    estimate = pv.log_evidence(*masked, x, 10_000)
    expected = torch.where(mask, components(x).logsumexp(-1), torch.zeros(6))
    assert ((estimate.values - expected).abs() < 5 * estimate.standard_error + 1e-5).all()


def test_reconstruction_draws_an_enumerated_site_from_its_posterior():
    x = torch.full((20_000,), 1.0)
    mean = pv.reconstruct(Mixture(), Exact(), x)["x"].mean
    # k | x first, then z | k, x: E[z + k | x]
    weights = components(x[:1]).softmax(-1)[0]
    k = torch.arange(3)
    expected = (weights * ((CENTRES * 4 + 1.0 - k) / 5 + k)).sum()
    assert mean.mean().item() == pytest.approx(expected.item(), abs=5 * mean.std().item() / math.sqrt(len(x)))


class Exact(PyroModule):
    """p(z | x) of the mixture."""

    def forward(self, x):
        k = torch.arange(3)
        posteriors = dist.Normal((CENTRES * 4 + x[:, None] - k) / 5, math.sqrt(0.2))
        with pyro.plate("data", len(x)):
            mixing = dist.Categorical(logits=components(x))
            pyro.sample("z", dist.MixtureSameFamily(mixing, posteriors))


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


def test_a_nested_plate_is_summed_within_its_datum():
    """x_ij ~ N(z_i, 1): the evidence of row i is N(0, I + 1 1^T)."""

    def model(x):
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0))
            with pyro.plate("parts", 3, dim=-1):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(x.mean(-1, keepdim=True), 0.8))

    x = torch.randn(4, 3)
    exact = dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + 1).log_prob(x)
    estimate = pv.log_evidence(model, guide, x, 20_000)
    assert ((estimate.values - exact).abs() < 5 * estimate.standard_error).all()


@pytest.mark.parametrize("batch", ["x", {"x": torch.zeros(2, 5)}])
def test_a_batch_without_an_order_is_refused(linear, batch):
    model, guide, _ = linear
    with pytest.raises(
        ValueError, match=f"batch: expected a tensor, or a tuple or list.*got {type(batch).__name__}"
    ):
        pv.log_evidence(model, guide, batch)


def test_a_plate_that_subsamples_by_itself_is_refused():
    def model(x):
        with pyro.plate("data", len(x), subsample_size=2) as rows:
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    def guide(x):
        with pyro.plate("data", len(x), subsample_size=2):
            pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))

    with pytest.raises(
        ValueError, match="'data': expected all 4 data points.*got a plate that draws 2 of them"
    ):
        pv.elbo_terms(model, guide, torch.randn(4))


def test_deterministic_sites_and_factors_are_no_likelihoods():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
            pyro.deterministic("grey", 255 * z.new_ones(len(x)) / 0)
            pyro.factor("bonus", torch.zeros(len(x)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.8))

    x = torch.randn(4)
    assert list(pv.generate(model, x)) == list(pv.reconstruct(model, guide, x)) == ["x"]
    assert pv.elbo_terms(model, guide, x).elbo.isfinite().all()


def test_numpy_numbers_are_numbers(linear):
    import numpy as np

    assert pv.log_evidence(*linear, np.int64(3)).values.shape == (50,)


@pytest.mark.parametrize("num_samples", [0, -1, 2.5])
def test_the_number_of_samples_is_positive(linear, num_samples):
    with pytest.raises(ValueError, match=f"num_samples: expected a positive whole number, got {num_samples}"):
        pv.log_evidence(*linear, num_samples)


@pytest.mark.parametrize("batch", [torch.zeros(0, 5), (), torch.tensor(1.0)])
def test_a_batch_that_is_none_is_refused(linear, batch):
    model, guide, _ = linear
    for evaluate in (pv.log_evidence, pv.elbo_terms):
        with pytest.raises(ValueError, match="Expected a batch of data"):
            evaluate(model, guide, batch)


def test_a_late_datum_outside_the_support_is_found(monkeypatch):
    """Only the first chunk is checked in full: the rest is found by its -inf."""
    monkeypatch.setattr(evaluation, "_ROWS", 4)
    model, guide = pair()
    x = data(size=40)
    x[-1, 0] = 0.5
    for evaluate in (
        lambda: pv.log_evidence(model, guide, x, 4),
        lambda: pv.elbo_terms(model, guide, x),
    ):
        with pytest.raises(ValueError, match=r"'x'.*outside its support in 1 of .*0\.5"):
            evaluate()


MEMORY = """
import torch
from torch import nn
import pyro_vae as pv
torch.set_num_threads(1)
model = pv.Model(pv.StandardNormal(2), nn.Sequential(pv.MLP(2, 8, 784), pv.Bernoulli()))
guide = pv.Guide(nn.Sequential(pv.MLP(784, 8, 4), pv.DiagNormal()))
x = torch.ones(16 * 800, 784)
for size in (16 * 40, 16 * 800):
    pv.log_evidence(model, guide, x[:size], 128, compiled=True)  # in chunks of sixteen data
    with open("/proc/self/status") as status:
        print(next(line.split()[1] for line in status if line.startswith("VmRSS")))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's /proc")
def test_memory_does_not_grow_with_the_number_of_data():
    """In most runs it would by hundreds of MB, in pieces between tensors of a few bytes that are kept."""
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    few, many = map(int, run.stdout.split())
    assert many - few < 150_000
