"""mask_missing: entries that are NaN do not count, whatever the pair and whatever is asked of it."""

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from observed_entries import evidence, linear
from pyro.infer import Trace_ELBO
from pyro.nn import PyroModule
from registry import LIKELIHOODS, data, pair
from torch import nn

import pyro_vae as pv
from pyro_vae.compiled import CapturedGraph
from pyro_vae.evaluation import weights

pytestmark = pytest.mark.filterwarnings("ignore:Encountered NaN")  # Pyro's, before the error


def with_holes(x, share=0.4):
    return x.masked_fill(torch.rand(x.shape) < share, math.nan)


def svi_of(model, guide, loss=None):
    still = torch.optim.SGD(pv.parameters(model, guide), lr=0.0)
    return pv.SVI(model, guide, still, loss=loss or Trace_ELBO())


class Model(PyroModule):
    """z ~ N(0, 1), and what ``observe`` makes of it."""

    def __init__(self, observe):
        super().__init__()
        self.w, self.observe = nn.Parameter(torch.tensor([1.0, -0.5, 0.3, 0.8])), observe

    def forward(self, x, *others):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            self.observe(z.unsqueeze(-1) * self.w, x, *others)


class Guide(PyroModule):
    """q(z | x), of a network that reads x as it is."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 1)

    def forward(self, x, *others):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.net(x.flatten(1)).squeeze(-1), 1.0))


def observing(observe):
    torch.manual_seed(1)
    return pv.mask_missing(Model(observe), Guide())


def normal(loc, x):
    pyro.sample("x", dist.Normal(loc, 0.7).to_event(1), obs=x)


# The mathematics.


def test_the_evidence_is_that_of_the_observed_entries():
    model, guide, x = linear()
    estimate = pv.log_evidence(*pv.mask_missing(model, guide), x, 4000)
    exact = evidence(model, x)
    assert ((estimate.values - exact).abs() < 5 * estimate.standard_error).all()
    assert estimate.standard_error.max() < 0.06
    assert exact[3] == 0


def test_chunks_and_graphs_have_the_evidence_too(monkeypatch):
    model, guide, x = linear()
    monkeypatch.setattr(weights, "ROWS", 512)
    monkeypatch.setattr(CapturedGraph, "compile", lambda graph: graph)  # which replays it
    found = []
    for compiled in (False, True):
        torch.manual_seed(2)
        found.append(pv.log_evidence(*pv.mask_missing(model, guide), x, 1000, compiled=compiled))
    torch.testing.assert_close(*found)
    assert ((found[0].values - evidence(model, x)).abs() < 5 * found[0].standard_error).all()


def test_the_elbo_is_that_of_the_observed_entries():
    model, guide, x = linear(6)
    linear_layer, family = model.decoder
    weight, bias, sigma = linear_layer.weight, linear_layer.bias, family(linear_layer.bias).base_dist.scale[0]
    mean, log_sigma = guide.encoder[0](x.nan_to_num()).chunk(2, -1)
    variance = (2 * log_sigma).exp()
    errors = (x.nan_to_num() - mean @ weight.T - bias).square() + variance @ weight.T.square()
    of_entry = -errors / (2 * sigma**2) - torch.log(math.sqrt(2 * math.pi) * sigma)
    reconstruction = of_entry.masked_fill(x.isnan(), 0).sum(-1)
    kl = 0.5 * (variance + mean.square() - 1 - 2 * log_sigma).sum(-1)

    terms = pv.elbo_terms(*pv.mask_missing(model, guide), x.repeat(2000, 1))
    for drawn, exact in zip(terms, (reconstruction - kl, reconstruction, kl), strict=True):
        drawn = drawn.reshape(2000, 6)
        error = drawn.std(0) / math.sqrt(2000)
        assert ((drawn.mean(0) - exact).abs() < 5 * error + 1e-9).all()


@pytest.mark.parametrize("compiled", [False, True])
def test_the_gradient_of_iwae_is_that_of_the_observed_entries(compiled):
    model, guide, x = linear(8)
    loss = pv.IWAE(4)
    svi = svi_of(*pv.mask_missing(model, guide), pv.CompiledELBO(loss, backend="eager") if compiled else loss)
    svi.step(x)
    torch.manual_seed(3)
    value = svi.step(x)
    found = [p.grad.clone() for p in pv.parameters(model, guide)]

    torch.manual_seed(3)
    mean, log_sigma = guide.encoder[0](x.nan_to_num()).chunk(2, -1)
    q = dist.Normal(mean, log_sigma.exp()).to_event(1)
    z = q.rsample((4,))
    p = model.decoder(z).base_dist.log_prob(x.nan_to_num()).masked_fill(x.isnan(), 0).sum(-1)
    log_w = p + dist.Normal(torch.zeros_like(z), 1.0).to_event(1).log_prob(z) - q.log_prob(z)
    bound = (log_w.logsumexp(0) - math.log(4)).sum()
    assert value == pytest.approx(-bound.item())
    torch.testing.assert_close(found, list(torch.autograd.grad(-bound, pv.parameters(model, guide))))


def test_with_many_particles_it_is_the_gradient_of_the_evidence():
    model, guide, x = linear(8)
    svi_of(*pv.mask_missing(model, guide), pv.IWAE(20_000)).step(x)
    ours = list(model.decoder.parameters())
    exact = torch.autograd.grad(-evidence(model, x).sum(), ours)
    for p, gradient in zip(ours, exact, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=0.03, atol=0.3)


# Any likelihood.


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_without_nan_nothing_changes(likelihood):
    model, guide = pair(likelihood)
    x = data(likelihood)
    found = []
    for programs in ((model, guide), pv.mask_missing(model, guide)):
        torch.manual_seed(4)
        svi = svi_of(*programs, pv.IWAE(2))
        numbers = [svi.step(x), svi.evaluate_loss(x), *pv.log_evidence(*programs, x, 3).values]
        found.append([*map(float, numbers), [p.grad.clone() for p in pv.parameters(*programs)]])
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_every_likelihood_leaves_nan_out(likelihood):
    model, guide = pair(likelihood)
    masked, x = pv.mask_missing(model, guide), with_holes(data(likelihood))
    losses = []
    for loss in (pv.IWAE(2), pv.CompiledELBO(pv.IWAE(2), backend="eager")):
        svi = svi_of(*masked, loss)
        svi.step(x)
        torch.manual_seed(5)
        losses.append(svi.step(x))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert pv.reconstruct(*masked, x)["x"].mean.isfinite().all()
    assert pv.generate(masked[0], x)["x"].sample().isfinite().all()
    assert pv.latent_terms(*masked, x, num_samples=2)["z"].kl.isfinite().all()
    torch.manual_seed(6)
    z = guide.encoder(x.nan_to_num()).sample()
    pixels = model.decoder(z).base_dist.log_prob(x.nan_to_num())
    torch.manual_seed(6)
    found = pv.elbo_terms(*masked, x).reconstruction
    torch.testing.assert_close(found, pixels.masked_fill(x.isnan(), 0).sum(-1).detach())


@pytest.mark.parametrize(
    "family",
    [
        lambda loc: dist.LogNormal(loc, 1.0),
        lambda loc: dist.Gamma(loc.exp(), 1.0),
        lambda loc: dist.Beta(loc.exp(), 2.0),
        lambda loc: dist.Exponential(loc.exp()),
        lambda loc: dist.Poisson(loc.exp()),
        lambda loc: dist.Uniform(loc - 9, loc + 9),
        lambda loc: dist.VonMises(loc, 1.0),
    ],
)
def test_what_is_filled_in_lies_in_any_support(family):
    masked = observing(lambda loc, x: pyro.sample("x", family(loc).to_event(1), obs=x))
    x = with_holes(
        torch.full((6, 4), 0.5) if family(torch.zeros(4)).support.is_discrete is False else torch.ones(6, 4)
    )
    for loss in (pv.IWAE(3), pv.CompiledELBO(pv.IWAE(3), backend="eager")):
        assert math.isfinite(svi_of(*masked, loss).step(x))
    assert pv.impute(*masked, x, 5)["x"].draw.isfinite().all()


# Any program.


def test_x_may_be_transformed_before_it_is_observed():
    images = with_holes(torch.rand(6, 1, 2, 2))

    def transformed(loc, x):
        pyro.sample("x", dist.Normal(loc, 0.7).to_event(1), obs=(x.flatten(1) - 0.5) / 0.3)

    one, two = observing(transformed), observing(normal)
    found = []
    for masked, x in ((one, images), (two, (images.flatten(1) - 0.5) / 0.3)):
        masked[1].args[0].net = nn.Linear(4, 1)
        nn.init.zeros_(masked[1].args[0].net.weight)
        nn.init.zeros_(masked[1].args[0].net.bias)
        torch.manual_seed(7)
        found.append(pv.elbo_terms(*masked, x).elbo)
    torch.testing.assert_close(*found)


def test_several_sites_several_arguments_and_masks_of_rows():
    def both(loc, x, y, counted):
        pyro.sample("x", dist.Normal(loc, 0.7).to_event(1).mask(counted), obs=x)
        pyro.sample("y", dist.Normal(loc.sum(-1), 1.0), obs=y)
        pyro.sample("label", dist.Bernoulli(logits=loc[..., 0]), obs=counted.float())

    x, y, counted = with_holes(torch.randn(8, 4)), with_holes(torch.randn(8)), torch.arange(8) < 6
    masked = observing(both)
    torch.manual_seed(8)
    found = pv.elbo_terms(*masked, (x, y, counted)).reconstruction
    torch.manual_seed(8)
    model, guide = (program.args[0] for program in masked)
    z = dist.Normal(guide.net(x.nan_to_num()).squeeze(-1), 1.0).sample()
    loc = z.unsqueeze(-1) * model.w
    of_x = dist.Normal(loc, 0.7).log_prob(x.nan_to_num()).masked_fill(x.isnan(), 0).sum(-1) * counted
    of_y = dist.Normal(loc.sum(-1), 1.0).log_prob(y.nan_to_num()).masked_fill(y.isnan(), 0)
    of_label = dist.Bernoulli(logits=loc[..., 0]).log_prob(counted.float())
    torch.testing.assert_close(found, (of_x + of_y + of_label).detach())


def test_a_subsampled_plate_is_scaled_as_ever():
    x = with_holes(torch.randn(40, 4))

    def model(x):
        with pyro.plate("data", len(x), subsample_size=10) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), torch.ones(4)).to_event(1), obs=x[rows])

    class Rows(PyroModule):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.zeros(()))

        def forward(self, x):
            with pyro.plate("data", len(x), subsample_size=10):
                pyro.sample("z", dist.Normal(self.loc, 1e-3))

    svi = svi_of(*pv.mask_missing(model, Rows()))
    total = torch.tensor([svi.evaluate_loss(x) for _ in range(200)])
    q = dist.Normal(0.0, 1e-3)
    kl = torch.distributions.kl_divergence(q, dist.Normal(0.0, 1.0))
    exact = 40 * kl - dist.Normal(0.0, 1.0).log_prob(x[~x.isnan()]).sum()
    assert (total.mean() - exact).abs() < 5 * total.std() / math.sqrt(200)


def test_a_distribution_that_takes_nan_itself_is_left_alone():
    def joint(loc, x):
        covariance = 0.49 * torch.eye(4)
        pyro.sample("x", dist.NanMaskedMultivariateNormal(loc, covariance), obs=x)

    x = with_holes(torch.randn(8, 4))
    losses = []
    for observe in (joint, normal):
        svi = svi_of(*observing(observe))
        torch.manual_seed(9)
        losses.append(svi.step(x))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_it_wraps_twice_copies_and_stays_inside_other_handlers():
    once, x = observing(normal), with_holes(torch.randn(8, 4))
    plain = [program.args[0] for program in once]
    assert pv.parameters(*once) == pv.parameters(*plain)
    losses = []
    for programs in (
        once,
        pv.mask_missing(*once),
        copy.deepcopy(once),
        [pv.scale_latents(1.0)(program) for program in once],
        pv.mask_missing(*(pv.scale_latents(1.0)(program) for program in plain)),
    ):
        svi = svi_of(*programs)
        torch.manual_seed(10)
        losses.append(svi.step(x))
    assert losses == 5 * losses[:1]
    masked = pv.mask_missing(*linear(4)[:2])
    twin = pickle.loads(pickle.dumps(masked))
    assert pv.log_evidence(*twin, linear(4)[2], 3).values.isfinite().all()


# What is refused.


def test_a_joint_distribution_of_the_entries_is_refused():
    def joint(loc, x):
        pyro.sample("x", dist.MultivariateNormal(loc, torch.eye(4)), obs=x)

    masked, x = observing(joint), with_holes(torch.randn(8, 4))
    svi = svi_of(*masked)
    assert math.isfinite(svi.step(x.nan_to_num()))
    message = (
        r"Site 'x' of the model, MultivariateNormal: .*got NaN .*To fix: .*a product over single entries.*"
        r"NanMaskedMultivariateNormal"
    )
    for use in (svi.step, svi_of(*masked).step, lambda x: pv.log_evidence(*masked, x, 3)):
        with pytest.raises(ValueError, match=message):
            use(x)


@pytest.mark.parametrize(
    "observe",
    [
        lambda loc, x: pyro.sample("x", dist.Bernoulli(logits=loc).to_event(1), obs=(x > 0.5).float()),
        lambda loc, x: pyro.sample("x", dist.Bernoulli(logits=loc).to_event(1), obs=x.nan_to_num()),
        lambda loc, x: pyro.sample("x", dist.Poisson(loc.exp()).to_event(1), obs=x.long().abs() * 0),
    ],
)
def test_nan_that_a_model_makes_a_number_is_refused(observe):
    masked, x = observing(observe), (torch.rand(8, 4) > 0.5).float()
    svi = svi_of(*masked)
    svi.step(x)
    x[2, 1] = x[5, 0] = math.nan
    for use in (svi.step, svi_of(*masked).step, lambda x: pv.elbo_terms(*masked, x)):
        with pytest.raises(
            ValueError, match=r"expected every NaN of the batch at an observed site, got 0 of 2"
        ):
            use(x)


def test_a_network_of_the_model_that_reads_nan_is_refused():
    def reading(loc, x):
        normal(loc + x.mean(-1, keepdim=True), x)

    with pytest.raises(ValueError, match="The model: expected its networks to read numbers, got NaN"):
        svi_of(*observing(reading)).step(with_holes(torch.randn(8, 4)))


def test_a_batch_in_which_all_is_missing_does_not_train():
    """As after a division by the standard deviation of columns that hold NaN."""
    model, guide = pv.mask_missing(*pair("gaussian"))
    svi = pv.SVI(model, guide, pyro.optim.Adam({}), loss=pv.IWAE(3))
    x = torch.full((5, 6), torch.nan)
    with pytest.raises(ValueError, match="expected some observed entries, got NaN in all 30.*numpy.nanmean"):
        svi.step(x)
    x[0, 0] = 1.0
    svi.step(x)
    assert pv.log_evidence(model, guide, torch.full((2, 6), torch.nan), 5).values.isfinite().all()


def test_infinity_is_not_missing():
    masked, x = observing(normal), with_holes(torch.randn(8, 4))
    x[0, 0] = math.inf
    for use in (svi_of(*masked).step, lambda x: pv.log_evidence(*masked, x, 3)):
        with pytest.raises(ValueError, match="To fix: leave infinite values out"):
            use(x)


def test_what_is_no_program_is_refused_and_the_plain_pair_is_told_of_it():
    with pytest.raises(ValueError, match="guide: expected a module or a function, got 3"):
        pv.mask_missing(Model(normal), 3)
    x = with_holes(torch.randn(8, 4))
    for masked in (False, True):
        programs = Model(normal), Guide()
        if masked:
            programs = programs[0], pv.mask_missing(*programs)[1]
        with pytest.raises(ValueError, match=r"To fix: .*pyro_vae\.mask_missing\(model, guide\)"):
            pv.log_evidence(*programs, x)
