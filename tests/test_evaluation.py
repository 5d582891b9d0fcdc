import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from registry import LIKELIHOODS, POSTERIORS, data, pair
from torch import nn

import pyro_vae as pv
from pyro_vae import elbos, evaluation, references


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

    estimate = pv.log_evidence(model, Posterior(), x, 2)
    torch.testing.assert_close(estimate.values, references.evidence(model, x))
    torch.testing.assert_close(estimate.standard_error, torch.zeros_like(estimate.values), atol=1e-6, rtol=0)


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
    whole = pv.log_evidence(model, guide, x, 4000)
    monkeypatch.setattr(evaluation, "_ROWS", 64)
    parts = pv.log_evidence(model, guide, x, 4000)
    assert ((whole.values - parts.values).abs() < 6 * whole.standard_error).all()


def test_elbo_terms_are_the_closed_form(linear):
    model, guide, x = linear
    exact = {"reconstruction": references.reconstruction(model, guide, x), "kl": references.kl(guide, x)}
    runs = [pv.elbo_terms(model, guide, x) for _ in range(1000)]
    for name, expected in exact.items():
        values = torch.stack([getattr(run, name) for run in runs]).double()
        error = values.std(0) / math.sqrt(len(runs))
        assert ((values.mean(0) - expected).abs() < 5 * error).all()
    torch.testing.assert_close(runs[0].elbo, runs[0].reconstruction - runs[0].kl)


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
    assert elbos.layout(model, guide, (x,), {}, particles=True).particle_dim is None
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
    assert elbos.layout(model, guide, (x,), {}, particles=True).particle_dim is None
    plain_model, plain_guide = pair(width=8)
    assert elbos.layout(plain_model, plain_guide, (x,), {}, particles=True).particle_dim == -2


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

    with pytest.raises(ValueError, match=r"'scale'.*outside the plate 'data'"):
        pv.log_evidence(model, guide, torch.randn(4), 10)


def test_a_subsampled_plate_within_a_datum_is_refused():
    def model(x):
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0))
            with pyro.plate("parts", 6, subsample_size=3, dim=-1):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(torch.zeros(1), 1.0))

    with pytest.raises(ValueError, match=r"'x'.*'parts'.*subsamples 3 of 6"):
        pv.log_evidence(model, guide, torch.randn(4, 3), 10)


def test_an_enumerated_site_is_refused_by_evaluation():
    @pyro.infer.config_enumerate
    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    for evaluate in (lambda *pair: pv.log_evidence(*pair, 5), pv.elbo_terms):
        with pytest.raises(ValueError, match=r"does not sample \['k'\].*sum it out"):
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
    with pytest.raises(ValueError, match="A batch is a tensor, or a tuple or list"):
        pv.log_evidence(model, guide, batch)


def test_a_plate_that_subsamples_by_itself_is_refused():
    def model(x):
        with pyro.plate("data", len(x), subsample_size=2) as rows:
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    def guide(x):
        with pyro.plate("data", len(x), subsample_size=2):
            pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))

    with pytest.raises(ValueError, match="draws 2 of the 4 data given"):
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
    with pytest.raises(ValueError, match="num_samples is a positive whole number"):
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
