"""Pyro's ELBOs through this package's model, guide and SVI, held against the linear-Gaussian VAE."""

import math
import re
from contextlib import nullcontext
from functools import partial
from itertools import pairwise

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from registry import data, pair
from torch import nn
from torch.distributions import kl_divergence

import pyro_vae as pv
from pyro_vae.elbos.mean_field import analytic_kl
from pyro_vae.evaluation import references
from pyro_vae.programs import traces
from pyro_vae.programs.traces import latent_sites

PARTICLES = 4_000


@pytest.fixture
def case():
    model, guide = references.linear_gaussian()
    return model, guide, torch.randn(4, 5, dtype=torch.float64)


def test_elbo_never_exceeds_the_evidence_and_meets_it_at_the_posterior(case):
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
    """With the KL taken out of a mean-field loss, what stays is a reconstruction of the same z."""
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


# The objectives of this package, held against quadrature.


class At(Messenger):
    """Put the latents of a Gaussian guide at mean + sigma * eps."""

    def __init__(self, eps):
        super().__init__()
        self.eps = eps

    def _pyro_sample(self, msg):
        if msg["name"] in self.eps:
            fn = msg["fn"]
            eps = self.eps[msg["name"]]
            msg["value"] = fn.mean + fn.stddev * eps.reshape(-1, 1, *[1] * fn.event_dim)


def quadrature(model, guide, x, latents=("z",), *, alpha=0.0, beta=1.0, particles=2, nodes=40):
    """The bound of one or two particles, (N,), by Gauss-Hermite quadrature over the guide's noise."""
    points, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(nodes))
    grid = torch.cartesian_prod(*[points] * len(latents)).reshape(-1, len(latents))
    weights = torch.cartesian_prod(*[weights / math.sqrt(2 * math.pi)] * len(latents))
    weights = weights.reshape(-1, len(latents)).prod(-1)
    plate = pyro.plate("nodes", len(grid), dim=-2)
    at = At({name: grid[:, i] for i, name in enumerate(latents)})
    guide_trace = poutine.trace(at(plate(guide))).get_trace(x)
    model_trace = poutine.trace(poutine.replay(plate(model), trace=guide_trace)).get_trace(x)
    guide_trace.compute_log_prob()
    model_trace.compute_log_prob()
    log_w = model_trace.nodes["x"]["unscaled_log_prob"]
    for name in latents:
        p, q = (trace.nodes[name]["unscaled_log_prob"] for trace in (model_trace, guide_trace))
        log_w = log_w + beta * (p - q)
    if alpha == 1:
        return weights @ log_w
    assert particles == 2
    pairs = torch.logaddexp(*((1 - alpha) * part for part in (log_w.unsqueeze(0), log_w.unsqueeze(1))))
    return torch.einsum("i,j,ijn->n", weights, weights, (pairs - math.log(2)) / (1 - alpha))


def flat(value, trained):
    """A value with its gradients, as one vector."""
    grads = torch.autograd.grad(value, trained, retain_graph=True)
    return torch.cat([value.reshape(1), *(g.flatten() for g in grads)]).detach()


def check_unbiased(elbo, model, guide, x, exact, *, beta=1.0, copies=150, draws=30, noise=0.05):
    """Value and gradients are the exact ones, within five standard errors that are small against them."""
    trained = pv.parameters(model, guide)
    exact = flat(-exact.sum(), trained)
    found = []
    with pv.scale_latents(beta):
        for _ in range(draws):
            loss = elbo.differentiable_loss(model, guide, x.repeat(copies, 1))
            found.append(flat(loss, trained) / copies)
    found = torch.stack(found)
    error = found.std(0) / math.sqrt(draws)
    assert ((found.mean(0) - exact).abs() < 5 * error + 1e-4 * exact.abs().max()).all()
    assert error[1:].norm() < noise * exact[1:].norm()


OBJECTIVES = {
    "STL": (pv.STL(), 1),
    "STL, three particles": (pv.STL(3), 1),
    "MeanField": (pv.MeanField(), 1),
    "MeanField, one by one": (pv.MeanField(3, vectorize_particles=False), 1),
    "FreeBits, none": (pv.FreeBits(0.0), 1),
    "IWAE": (pv.IWAE(2), 0),
    "IWAE, one by one": (pv.IWAE(2, vectorize_particles=False), 0),
    "Renyi 0.5": (pv.Renyi(0.5, 2), 0.5),
    "Renyi -1": (pv.Renyi(-1, 2), -1),
    "Renyi 1": (pv.Renyi(1, 2), 1),
    "DReG": (pv.DReG(2), 0),
    "DReG, one by one": (pv.DReG(2, vectorize_particles=False), 0),
}


@pytest.mark.parametrize("beta", [1.0, 0.3])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_value_and_gradient_are_those_of_quadrature(name, beta):
    elbo, alpha = OBJECTIVES[name]
    model, guide = references.linear_gaussian(width=3, dim=1)
    references.set_to_posterior(model, guide, spread=1.3)
    guide.encoder[0].bias.data[0] += 0.3
    x = torch.randn(3, 3, dtype=torch.float64)
    check_unbiased(elbo, model, guide, x, quadrature(model, guide, x, alpha=alpha, beta=beta), beta=beta)


def test_quadrature_is_right():
    model, guide = references.linear_gaussian(width=3, dim=1)
    x = torch.randn(3, 3, dtype=torch.float64)
    found = quadrature(model, guide, x, alpha=1)
    torch.testing.assert_close(found, references.elbo(model, guide, x))
    references.set_to_posterior(model, guide)
    torch.testing.assert_close(quadrature(model, guide, x), references.evidence(model, x))
    references.set_to_posterior(model, guide, spread=1.5)
    found = quadrature(model, guide, x)
    torch.testing.assert_close(found, quadrature(model, guide, x, nodes=60), rtol=1e-5, atol=1e-5)


class Deep(PyroModule):
    """z2 ~ N(0, 1); z1 ~ N(a z2, 0.8); x ~ N(b z1 + c z2, 0.7)."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.7).double())
        self.b, self.c = (nn.Parameter(torch.randn(3).double()) for _ in range(2))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(torch.zeros(()).double(), 1.0))
            z1 = pyro.sample("z1", dist.Normal(self.a * z2, 0.8))
            loc = self.b * z1.unsqueeze(-1) + self.c * z2.unsqueeze(-1)
            pyro.sample("x", dist.Normal(loc, 0.7).to_event(1), obs=x)


class Chain(PyroModule):
    """q(first | x) q(second | first, x), linear and Gaussian."""

    def __init__(self, first, second, net=None):
        super().__init__()
        self.names = first, second
        self.w = nn.Parameter(0.2 * torch.randn(2, 3).double())
        self.d = nn.Parameter(torch.tensor([0.4, 0.6]).double())
        self.log_sigma = nn.Parameter(torch.tensor([-0.5, -0.4]).double())
        self.net = net or nn.Identity()

    def forward(self, x):
        first, second = self.names
        h, sigma = self.net(x) @ self.w.T, self.log_sigma.exp()
        with pyro.plate("data", len(x)):
            z = pyro.sample(first, dist.Normal(h[..., 0] + self.d[0], sigma[0]))
            pyro.sample(second, dist.Normal(h[..., 1] + self.d[1] * z, sigma[1]))


def posterior_chain(model, first, second, spread=1.0):
    """The posterior of Deep as a chain in either order, with so many times its spread."""
    a, b, c = (p.detach() for p in (model.a, model.b, model.c))
    factors = torch.stack([b, c])
    loading = factors / 0.49
    precision = (
        loading @ factors.T + torch.tensor([[1 / 0.64, -a / 0.64], [-a / 0.64, 1 + a**2 / 0.64]]).double()
    )
    covariance = torch.linalg.inv(precision)
    f, s = (("z1", "z2").index(name) for name in (first, second))
    guide = Chain(first, second)
    with torch.no_grad():
        guide.w.copy_(torch.stack([(covariance @ loading)[f], loading[s] / precision[s, s]]))
        guide.d.copy_(torch.stack([0 * a, -precision[s, f] / precision[s, s]]))
        guide.log_sigma.copy_(
            torch.stack([covariance[f, f], 1 / precision[s, s]]).log() / 2 + math.log(spread)
        )
    return guide


@pytest.mark.parametrize("order", [("z2", "z1"), ("z1", "z2")], ids=["top-down", "bottom-up"])
@pytest.mark.parametrize("name", ["STL", "MeanField", "IWAE", "DReG", "DReG, one by one"])
def test_two_latent_sites(name, order):
    """The path of q(second | first) through the first draw is there; no KL is analytic where it is wrong."""
    elbo, alpha = OBJECTIVES[name]
    model = Deep()
    guide = posterior_chain(model, *order, spread=1.4)
    guide.d.data += 0.2
    x = torch.randn(2, 3, dtype=torch.float64)
    exact = quadrature(model, guide, x, order, alpha=alpha, beta=0.7, nodes=18)
    check_unbiased(elbo, model, guide, x, exact, beta=0.7, copies=2000, noise=0.05, draws=20)


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


def test_bounds_are_in_order():
    model, guide = references.linear_gaussian(width=3, dim=1)
    references.set_to_posterior(model, guide, spread=2.0)
    x = torch.randn(4, 3, dtype=torch.float64)
    copies = x.repeat(3000, 1)
    evidence = references.evidence(model, x).sum().item()
    bounds = [-elbo.loss(model, guide, copies) / 3000 for elbo in map(pv.IWAE, (1, 2, 4, 8, 16))]
    assert all(low + 0.02 < high for low, high in pairwise([*bounds, evidence]))
    # falling in alpha, through the ELBO at 1
    renyi = [-pv.Renyi(a, 4).loss(model, guide, copies) / 3000 for a in (-1, 0, 0.5, 1, 2)]
    assert all(low + 0.02 < high for high, low in pairwise(renyi))
    assert renyi[3] == pytest.approx(references.elbo(model, guide, x).sum().item(), abs=0.05)


# Plates, masks and scales.

EVERY = {
    "IWAE": pv.IWAE(3),
    "IWAE, one by one": pv.IWAE(3, vectorize_particles=False),
    "Renyi": pv.Renyi(0.5, 3),
    "STL": pv.STL(3),
    "DReG": pv.DReG(3),
    "DReG, one by one": pv.DReG(3, vectorize_particles=False),
    "MeanField": pv.MeanField(3),
    "FreeBits": pv.FreeBits(0.2, 3),
}
every = pytest.mark.parametrize("elbo", EVERY.values(), ids=EVERY)


class Plated(PyroModule):
    """A pair of a local latent, with a plate of the caller's making, and inner plates or events."""

    def __init__(self, plate, inner=False, mask=None):
        super().__init__()
        self.plate, self.inner, self.mask = plate, inner, mask
        self.loc = nn.Parameter(torch.tensor([0.3, -0.2, 0.5]).double())
        self.w = nn.Parameter(torch.tensor(0.4).double())

    def side(self, x, q):
        across = pyro.plate("across", 3, dim=-1) if self.inner else nullcontext()
        event = 0 if self.inner else 1
        with self.plate(x), poutine.mask(mask=True if self.mask is None else self.mask):
            with across:
                loc = self.w * x + self.loc if q else torch.zeros(3).double()
                z = pyro.sample("z", dist.Normal(loc, 0.8 if q else 1.0).to_event(event))
            if not q:
                with across:
                    pyro.sample("x", dist.Normal(z, 0.7).to_event(event), obs=x)

    def model(self, x):
        self.side(x, False)

    def guide(self, x):
        self.side(x, True)


def of(pair, elbo, x, beta=0.7):
    torch.manual_seed(2)
    with pv.scale_latents(beta):
        return flat(elbo.differentiable_loss(pair.model, pair.guide, x), list(pair.parameters()))


def whole(x):
    return pyro.plate("data", len(x))


def subsampled(x):
    return pyro.plate("data", 10, subsample=torch.arange(len(x)))


def outer(x):
    return pyro.plate("data", len(x), dim=-2)


@every
def test_the_scale_of_a_subsampled_plate_stands_before_the_logarithm(elbo):
    x = torch.randn(4, 3, dtype=torch.float64)
    torch.testing.assert_close(of(Plated(subsampled), elbo, x), 10 / 4 * of(Plated(whole), elbo, x))


@pytest.mark.parametrize("side_by_side", [True, False])
def test_all_particles_are_of_the_data_that_a_plate_draws(side_by_side):
    """At the exact posterior a weight is the evidence of its datum, and a mixture of data is seen."""
    model, guide = references.linear_gaussian(width=3, dim=1)
    references.set_to_posterior(model, guide)
    x = torch.tensor([[0.0] * 3, [5.0] * 3], dtype=torch.float64)

    def draws(program):
        def run(x):
            with pyro.plate("data", 2, subsample_size=1) as i:
                if program is guide:
                    pyro.sample("z", guide.encoder(x[i]))
                else:
                    z = pyro.sample("z", model.prior())
                    pyro.sample("x", model.decoder(z), obs=x[i])

        return run

    evidence = (-2 * references.evidence(model, x)).tolist()
    elbo = pv.IWAE(8, vectorize_particles=side_by_side)
    losses = {round(elbo.loss(draws(model), draws(guide), x), 6) for _ in range(20)}
    assert sorted(losses) == pytest.approx(sorted(evidence))


@every
def test_a_plate_inside_a_datum_is_an_event(elbo):
    x = torch.randn(4, 3, dtype=torch.float64)
    inner, event = Plated(outer, inner=True), Plated(whole)
    if isinstance(elbo, pv.FreeBits):
        elbo = pv.FreeBits(0.0, 3)  # its groups are the plate's members
    torch.testing.assert_close(of(inner, elbo, x), of(event, elbo, x))


@every
def test_a_masked_datum_counts_for_nothing(elbo):
    x = torch.randn(4, 3, dtype=torch.float64)
    mask = torch.tensor([True, False, True, True])
    found = of(Plated(whole, mask=mask), elbo, x)
    other = torch.where(mask.unsqueeze(-1), x, -x)
    torch.testing.assert_close(found, of(Plated(whole, mask=mask), elbo, other))
    if not isinstance(elbo, pv.FreeBits):  # which is no sum over data
        rest = of(Plated(whole, mask=~mask), elbo, x)
        torch.testing.assert_close(found + rest, of(Plated(whole), elbo, x))


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


# What a network, a family or a program does to an estimator.


def test_free_bits_are_free():
    x = torch.randn(4, 3, dtype=torch.float64)
    pair = Plated(outer, inner=True)
    torch.manual_seed(2)
    pair.guide(x)
    q = torch.distributions.Normal(pair.w * x + pair.loc, 0.8)
    kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).mean(0)
    for nats in (0.0, kl.median().item() + 1e-3, 5.0):
        torch.manual_seed(2)
        with pv.scale_latents(0.7):
            found = pv.FreeBits(nats).differentiable_loss(pair.model, pair.guide, x)
        torch.manual_seed(2)
        z = q.rsample()
        reconstruction = torch.distributions.Normal(z, 0.7).log_prob(x).sum()
        expected = 0.7 * 4 * kl.clamp(min=nats).sum() - reconstruction
        trained = list(pair.parameters())
        torch.testing.assert_close(flat(found, trained), flat(expected, trained))
    # subsampled, masked and with several draws: the mean is over the data that are there
    mask = torch.tensor([True, False, True, True])
    kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum(1)[mask].mean()
    losses = [of(Plated(subsampled, mask=mask), pv.FreeBits(nats, 3), x, beta=1)[0] for nats in (0.0, 5.0)]
    torch.testing.assert_close(losses[1] - losses[0], 10 / 4 * 3 * (5 - kl.detach()))


def test_analytic_where_it_is_right_and_why_not():
    x = torch.randn(2, 3, dtype=torch.float64)
    for order, expected in ((("z2", "z1"), []), (("z1", "z2"), ["z1"])):
        model_trace, guide_trace = traces.traces(Deep(), Chain(*order), (x,), {})
        p, q = latent_sites(model_trace), latent_sites(guide_trace)
        found = {name: analytic_kl(name, p, q) for name in order}
        assert [name for name, kl in found.items() if isinstance(kl, str)] == expected
        assert all(isinstance(kl, str) or kl.shape == (2,) for kl in found.values())
    assert found["z1"] == "the model draws z2 before z1, and the guide after it"

    def cauchy(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Cauchy(x, 1.0))

    def normal(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    latents = map(latent_sites, traces.traces(cauchy, normal, (torch.zeros(2),), {}))
    assert analytic_kl("z", *latents) == "no closed form is registered for Normal and Cauchy"
    assert pv.MeanField(2).loss(cauchy, normal, torch.zeros(2)) != 0


class Normed(PyroModule):
    """A decoder that particles on the left would break, silently so a BatchNorm1d of a batch's size."""

    def __init__(self, layer):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 6), layer, pv.Bernoulli())

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", pv.StandardNormal(2)())
            pyro.sample("x", self.net(z), obs=x)


def conv():
    return nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 1, 3, padding=1), nn.Flatten(1))


@pytest.mark.parametrize("layer", [lambda: nn.BatchNorm1d(6), conv], ids=["BatchNorm1d", "Conv1d"])
@pytest.mark.parametrize("elbo", [pv.IWAE, pv.DReG, pv.STL])
def test_a_network_that_cannot_take_particles_runs_one_by_one(layer, elbo):
    _, guide = pair(width=6)
    model = Normed(layer())
    x = data(size=6)
    losses = []
    for side_by_side in (True, False):
        torch.manual_seed(1)
        losses.append(elbo(3, vectorize_particles=side_by_side).differentiable_loss(model, guide, x))
    torch.testing.assert_close(*losses)


def test_dropout_in_the_decoder_leaves_particles_side_by_side():
    _, guide = pair()
    model = Normed(nn.Dropout(0.5))
    elbo = pv.IWAE(3)
    elbo.loss(model, guide, data())
    assert elbo.max_plate_nesting == 2  # the plates of the data and of the particles


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


# A discrete site that the model alone has is summed out.


class Clusters(PyroModule):
    """y ~ p(y); z ~ N(m_y, 1); x ~ N(z + shift_y, 0.5): y is summed out of prior and likelihood at once."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.randn(3).double())
        self.means, self.shift = (nn.Parameter(torch.randn(3).double()) for _ in range(2))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            p_y = dist.Categorical(logits=self.logits)
            y = pyro.sample("y", p_y, infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(self.means[y], 1.0))
            loc = (z + self.shift[y]).unsqueeze(-1).expand(*(z + self.shift[y]).shape, 3)
            pyro.sample("x", dist.Normal(loc, 0.5).to_event(1), obs=x)


class Summed(Clusters):
    """The same by hand: one factor."""

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
            log_p = self.logits.log_softmax(-1) + dist.Normal(self.means, 1.0).log_prob(z.unsqueeze(-1))
            shifted = z.unsqueeze(-1) + self.shift
            likelihood = dist.Normal(shifted.unsqueeze(-1), 0.5).log_prob(x.unsqueeze(-2)).sum(-1)
            prior = dist.Normal(torch.zeros(()).double(), 1.0).log_prob(z)
            pyro.factor("x", (log_p + likelihood).logsumexp(-1) - prior)


class Encoder(PyroModule):
    def __init__(self, has_rsample):
        super().__init__()
        self.linear = nn.Linear(3, 1).double()
        self.has_rsample = has_rsample

    def forward(self, x):
        with pyro.plate("data", len(x)):
            q = dist.Normal(self.linear(x).squeeze(-1), 0.6)
            pyro.sample("z", q.has_rsample_(self.has_rsample))


@pytest.mark.parametrize(
    ("name", "has_rsample"),
    [(name, True) for name in ("IWAE", "IWAE, one by one", "Renyi", "DReG", "DReG, one by one")]
    + [(name, False) for name in ("IWAE", "IWAE, one by one", "Renyi")],
)
def test_a_discrete_site_of_the_model_alone_is_summed_out(name, has_rsample):
    elbo, model, guide = EVERY[name], Clusters(), Encoder(has_rsample)
    by_hand = Summed()
    by_hand.load_state_dict(model.state_dict())
    x = torch.randn(4, 3, dtype=torch.float64)
    found = []
    for each in (model, by_hand):
        torch.manual_seed(1)
        found.append(flat(elbo.differentiable_loss(each, guide, x), pv.parameters(each, guide)))
    torch.testing.assert_close(*found)
    with (
        pv.scale_latents(0.5),
        pytest.raises(ValueError, match=r"'y', to be summed out.*no KL weight.*got the weight 0\.5"),
    ):
        elbo.differentiable_loss(model, guide, x)
    svi = pv.SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), loss=elbo)
    losses = [svi.step(x) for _ in range(30)]
    assert losses[-1] < losses[0]


def test_a_mixture_is_summed_out_without_a_guide():
    model = references.Mixture()
    x = torch.randn(5, 2, dtype=torch.float64)
    exact = flat(-model.evidence(x).sum(), list(model.parameters()))
    for elbo in (pv.IWAE(1), pv.IWAE(3), TraceEnum_ELBO(max_plate_nesting=1)):
        found = elbo.differentiable_loss(model, lambda x: None, x)
        torch.testing.assert_close(flat(found, list(model.parameters())), exact)
    torch.testing.assert_close(references.mixture_elbo(model, model.posterior(x), x), model.evidence(x))


# Under both SVIs, as a module, and compiled.


@every
def test_both_svis_take_the_same_steps(elbo):
    x = data()
    runs = []
    for make in (pv.SVI, pyro.infer.SVI):
        torch.manual_seed(0)
        pyro.clear_param_store()
        model, guide = pair()
        svi = make(model, guide, pyro.optim.Adam({"lr": 1e-2}), loss=elbo)
        torch.manual_seed(1)
        losses = torch.tensor([svi.step(x) for _ in range(3)])
        runs.append([losses, *(p.detach() for p in pv.parameters(model, guide))])
    for ours, theirs in zip(*runs, strict=True):
        torch.testing.assert_close(ours, theirs)
    model, guide = pair()
    elbo(model, guide)(x).backward()
    assert all(p.grad is not None for p in pv.parameters(model, guide))
    svi = pv.SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), loss=elbo)
    assert math.isfinite(svi.evaluate_loss(x))


@pytest.mark.parametrize("name", ["IWAE", "STL", "DReG", "MeanField", "FreeBits"])
def test_compiled_is_eager(name):
    elbo = EVERY[name]
    model, guide = Deep(), Chain("z2", "z1")
    x = torch.randn(4, 3, dtype=torch.float64)
    compiled = pv.CompiledELBO(elbo, backend="eager")
    trained = pv.parameters(model, guide)
    for _ in range(2):
        torch.manual_seed(3)
        expected = flat(elbo.differentiable_loss(model, guide, x), trained)
        torch.manual_seed(3)
        loss = compiled.loss_and_grads(model, guide, x)
        found = torch.cat([torch.tensor([loss]).double(), *(p.grad.flatten() for p in trained)])
        torch.testing.assert_close(found, expected)
        for p in trained:
            p.grad = None


# What is refused.


def inner_subsampled(x):
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0))
        with pyro.plate("pixels", 6, subsample_size=3, dim=-1) as i:
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, i])


def weighted_observation(x):
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0))
        with poutine.scale(scale=0.5):
            pyro.sample("x", dist.Normal(z.expand(len(x), 6), 1.0).to_event(1), obs=x)


def plain(x, size=None):
    with pyro.plate("data", size or len(x), subsample_size=len(x), dim=-2):
        pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 1.0))


def outside(x):
    pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))


def joint(x):
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0))
        pyro.sample("x", dist.Normal(z.expand(len(x), 6), 1.0), obs=x)


def poisson(x):
    with pyro.plate("data", len(x), dim=-2):
        pyro.sample("z", dist.Poisson(torch.ones(1)))


def without(x):
    pass


PER_DATUM = ("IWAE", "Renyi", "DReG", "IWAE, one by one")
NEED_PATHS = ("STL", "DReG", "DReG, one by one")


@pytest.mark.parametrize(
    ("model", "guide", "names", "message"),
    [
        (
            inner_subsampled,
            plain,
            PER_DATUM,
            "Site 'x': expected its other plates to be whole, got 'pixels' with 3 of 6",
        ),
        (
            weighted_observation,
            plain,
            PER_DATUM,
            "Site 'x', observed: expected the scale 1.0 of its plate 'data', got 0.5",
        ),
        (outside, outside, PER_DATUM, "Site 'z': expected it inside the plate 'data', got the plates none"),
        (
            joint,
            partial(plain, size=9),
            EVERY,
            "'z': expected the same scale in model and guide, got 1.0 in the model and 2.25 in the guide",
        ),
        (joint, poisson, NEED_PATHS, "Site 'z' of the guide, Poisson: expected a distribution with rsample"),
        (
            joint,
            without,
            EVERY,
            "the same in model and guide, got ['z'] only in the model and none only in the guide",
        ),
        (
            joint,
            poutine.mask(plain, mask=torch.eye(4)[:, :1] > 0),
            EVERY,
            "Site 'z': expected the same mask in model and guide, got different ones",
        ),
    ],
)
def test_what_would_be_wrong_is_refused(model, guide, names, message):
    x = torch.zeros(4, 6)
    for name in names:
        with pytest.raises(ValueError, match=re.escape(message)):
            EVERY[name].differentiable_loss(model, guide, x)


def test_several_weights_are_refused_by_dreg():
    def weigh(program):
        def run(x):
            with pyro.plate("data", len(x)):
                pyro.sample("a", dist.Normal(torch.zeros(()), 1.0))
                with poutine.scale(scale=0.5):
                    pyro.sample("b", dist.Normal(torch.zeros(()), 1.0))

        return run

    with pytest.raises(ValueError, match=r"expected one weight for all, got \{'a': 1.0, 'b': 0.5\}"):
        pv.DReG(2).differentiable_loss(weigh(0), weigh(1), torch.zeros(3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pv.IWAE(0), "num_particles: expected a positive whole number, got 0"),
        (lambda: pv.STL(1.5), "num_particles: expected a positive whole number, got 1.5"),
        (lambda: pv.Renyi(math.nan, 2), "alpha: expected a finite number, got nan"),
        (lambda: pv.FreeBits(-1.0), "nats: expected a finite number that is not negative, got -1.0"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
