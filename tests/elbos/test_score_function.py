"""Guides with draws that are not reparameterised: their gradients, exactly.

The data are copies of one data point, each with parameters of its own, and each draws one of all the tuples
that the particles could have drawn. So one backward pass gives the estimator's gradient for every tuple.
Weighted by how likely they are, they sum to its expectation, which has to be the gradient of the expected
bound.
"""

import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from registry import data
from torch import nn
from torch.distributions import kl_divergence

import pyro_vae as pv
from pyro_vae.elbos import importance
from pyro_vae.elbos import mean_field as kl
from pyro_vae.elbos.objective import Objective
from pyro_vae.elbos.score_function import bound, gain
from pyro_vae.evaluation import references

X = 0.8
THETA = torch.tensor([0.4, -0.3, 0.2, 0.5, -0.4, 0.3, 0.7, -0.2, -0.6], dtype=torch.float64)


def whole(x):
    return pyro.plate("data", len(x), dim=-2)


def subsampled(x):
    return pyro.plate("data", 10 * len(x), subsample=torch.arange(len(x)), dim=-2)


class Pair(PyroModule):
    """k_1 .. k_J of three values, u Gaussian, x ~ N(sum_j m[k_j] + 0.7 u, 0.6); one of them may be left out.

    The guide draws the sites in the order given, and q of the second depends on the first. theta is
    (9, copies), x is (copies, 1).
    """

    def __init__(self, order, copies, *, plate=whole, inner=1, scored=False, **masks):
        super().__init__()
        self.theta = nn.Parameter(THETA.unsqueeze(1).repeat(1, copies))
        self.order, self.plate, self.inner, self.scored, self.masks = order, plate, inner, scored, masks

    def p_k(self):
        t = self.theta.unsqueeze(-1)
        return dist.Categorical(logits=torch.stack([0 * t[0], t[0], t[1]], -1))

    def p_u(self):
        return dist.Normal(torch.zeros((), dtype=torch.float64), 1.0)

    def p_x(self, k, u):
        t = self.theta.unsqueeze(-1)
        means = torch.stack([-1 + 0 * t[2], t[2], 1.5 + t[3]], -1)
        m = means.expand(*k.shape, 3).gather(-1, k.unsqueeze(-1)).squeeze(-1)
        return dist.Normal(m.sum(-1, keepdim=True) + 0.7 * u, 0.6)

    def q_k(self, u):
        t = self.theta.unsqueeze(-1)
        logits = t[4] * X + u, t[5] + torch.arange(self.inner) - u * X, 0 * u
        return dist.Categorical(logits=torch.stack(torch.broadcast_tensors(*logits), -1))

    def q_u(self, k):
        t = self.theta.unsqueeze(-1)
        k = k.sum(-1, keepdim=True)
        q = dist.Normal(t[6] * X + t[7] * (k - 0.5), (t[8] + 0.2 * k).exp())
        return q.has_rsample_(False) if self.scored else q

    def first(self, x):
        """What stands for a site that is not drawn yet, or not at all."""
        return torch.zeros(len(x), self.inner, dtype=torch.long), torch.zeros(len(x), 1, dtype=torch.float64)

    def masked(self, name):
        return poutine.mask(mask=self.masks.get(name, True))

    def model(self, x):
        k, u = self.first(x)
        with self.plate(x):
            if "k" in self.order:
                with self.masked("k"), pyro.plate("across", self.inner, dim=-1):
                    k = pyro.sample("k", self.p_k())
            if "u" in self.order:
                with self.masked("u"):
                    u = pyro.sample("u", self.p_u())
            with self.masked("x"):
                pyro.sample("x", self.p_x(k, u), obs=x)

    def guide(self, x):
        k, u = self.first(x)
        with self.plate(x):
            for name in self.order:
                with self.masked(name):
                    if name == "u":
                        u = pyro.sample("u", self.q_u(k))
                    else:
                        with pyro.plate("across", self.inner, dim=-1):
                            k = pyro.sample("k", self.q_k(u))


class Draw(Messenger):
    """Draw these k, and u with this noise: for all particles at once, or for one after the other."""

    def __init__(self, k, noise, one_by_one):
        super().__init__()
        self.given = {"k": iter(k if one_by_one else [k]), "u": iter(noise if one_by_one else [noise])}

    def _pyro_sample(self, msg):
        if msg["name"] in self.given and msg["value"] is None:
            value, fn = next(self.given[msg["name"]]), msg["fn"]
            if msg["name"] == "u":
                value = fn.mean + fn.stddev * value
            msg["value"] = value if fn.has_rsample else value.detach()


# Noise and how likely it is. Reparameterised draws may have any: three values have N(0, 1)'s first moments.
THREE = np.polynomial.hermite_e.hermegauss(3)
MANY = np.polynomial.hermite_e.hermegauss(30)


class Case:
    """One data point for each tuple, and the tuples: k (K, copies, J), noise and its probability."""

    def __init__(self, order, particles, *, noise=THREE, inner=1, **about):
        each = itertools.product(
            itertools.product(range(3), repeat=inner) if "k" in order else [[0] * inner],
            zip(*noise, strict=True) if "u" in order else [(0.0, 1.0)],
        )
        all_tuples = list(itertools.product(list(each), repeat=particles))
        self.k = torch.tensor([[k for k, _ in row] for row in all_tuples]).transpose(0, 1)
        noise = torch.tensor([[n for _, n in row] for row in all_tuples], dtype=torch.float64).transpose(0, 1)
        self.noise, weights = noise[..., :1], noise[..., 1]
        self.weights = (weights / math.sqrt(2 * math.pi) if "u" in order else weights).prod(0)
        self.pair = Pair(order, len(all_tuples), inner=inner, **about)
        self.x = torch.full((len(all_tuples), 1), X, dtype=torch.float64)

    def run(self, elbo):
        """The loss, and its gradient for each tuple, (9, copies)."""
        elbo.loss(self.pair.model, self.pair.guide, self.x)  # the first finds the layout, by other draws
        side_by_side = elbo.num_particles > 1 and elbo.vectorize_particles
        assert elbo.max_plate_nesting == 2 + side_by_side  # with a plate of particles, or without
        with Draw(self.k, self.noise, not side_by_side):
            loss = elbo.differentiable_loss(self.pair.model, self.pair.guide, self.x)
        return loss, torch.autograd.grad(loss, self.pair.theta)[0]

    def expected(self, alpha, *, of_x=1.0, of_latents=1.0):
        """How likely each tuple is, and its bound, by the formulas."""
        k, u = self.pair.first(self.x)
        probs, log_r = self.weights, 0.0
        for name in self.pair.order:
            if name == "k":
                k, q = self.k, self.pair.q_k(u)
                log_q = q.log_prob(k).sum(-1)
                probs = probs * log_q.exp().prod(0)
                log_r = log_r + self.pair.p_k().log_prob(k).sum(-1) - log_q
            else:
                q = self.pair.q_u(k)
                u = q.mean + q.stddev * self.noise
                log_r = log_r + (self.pair.p_u().log_prob(u) - q.log_prob(u)).sum(-1)
        log_w = of_x * self.pair.p_x(k, u).log_prob(self.x).squeeze(-1) + of_latents * log_r
        if alpha == 1:
            return probs, log_w.mean(0)
        return probs, ((1 - alpha) * log_w).exp().mean(0).log() / (1 - alpha)

    def check(self, elbo, alpha, *, ratio=1.0, tolerance=1e-9, **terms):
        """The expected gradient is that of the expected bound, and the value that of the bound."""
        loss, grads = self.run(elbo)
        probs, bounds = self.expected(alpha, **terms)
        assert probs.sum().item() == pytest.approx(1)
        (exact,) = torch.autograd.grad(-ratio * (probs * bounds).sum(), self.pair.theta)
        exact, found = exact.sum(1), (probs * grads).sum(1)
        assert (exact[4:].abs() > 1e-3).sum() >= 2  # the guide has something to learn
        torch.testing.assert_close(found, exact, rtol=tolerance, atol=tolerance)
        if not isinstance(elbo, pv.MeanField | pv.FreeBits):  # which have another value at a draw
            torch.testing.assert_close(loss, -ratio * bounds.sum())


OBJECTIVES = {
    "IWAE 1": (lambda: pv.IWAE(1), 0),
    "IWAE 2": (lambda: pv.IWAE(2), 0),
    "IWAE 3": (lambda: pv.IWAE(3), 0),
    "IWAE 3, one by one": (lambda: pv.IWAE(3, vectorize_particles=False), 0),
    "Renyi 0.5": (lambda: pv.Renyi(0.5, 2), 0.5),
    "Renyi -1": (lambda: pv.Renyi(-1, 2), -1),
    "Renyi 1": (lambda: pv.Renyi(1, 3), 1),
    "MeanField 1": (lambda: pv.MeanField(1), 1),
    "MeanField 3": (lambda: pv.MeanField(3), 1),
    "MeanField 2, one by one": (lambda: pv.MeanField(2, vectorize_particles=False), 1),
    "FreeBits, none": (lambda: pv.FreeBits(0.0), 1),
    "FreeBits, none 2": (lambda: pv.FreeBits(0.0, 2), 1),
    "FreeBits, none 2, one by one": (lambda: pv.FreeBits(0.0, 2, vectorize_particles=False), 1),
}
objectives = pytest.mark.parametrize(("make", "alpha"), OBJECTIVES.values(), ids=OBJECTIVES)


@objectives
@pytest.mark.parametrize("order", ["k", "ku", "uk"])
def test_a_discrete_guide_and_mixed_ones(make, alpha, order):
    """With a reparameterised site after the discrete one, or before it, which then depends on that."""
    elbo = make()
    Case(order, elbo.num_particles).check(elbo, alpha)


@pytest.mark.parametrize("beta", [0.5, 0.0])
@objectives
def test_a_kl_weight_is_no_weight_of_the_score(make, alpha, beta):
    elbo = make()
    with pv.scale_latents(beta):
        Case("uk", elbo.num_particles).check(elbo, alpha, of_latents=beta)


@objectives
def test_the_scale_of_a_subsampled_plate_stands_outside(make, alpha):
    elbo = make()
    Case("ku", elbo.num_particles, plate=subsampled).check(elbo, alpha, ratio=10)


@objectives
def test_a_plate_inside_a_data_point(make, alpha):
    elbo = make()
    if elbo.num_particles < 3:
        Case("uk", elbo.num_particles, inner=2).check(elbo, alpha)
    else:
        Case("k", elbo.num_particles, inner=2).check(elbo, alpha)


@objectives
def test_a_mask_of_some_sites_weighs_what_a_draw_costs(make, alpha):
    """A masked latent is still drawn: it acts through the observed site. And the other way round."""
    elbo, none = make(), torch.zeros(1, 1, dtype=torch.bool)
    Case("uk", elbo.num_particles, k=none, u=none).check(elbo, alpha, of_latents=0.0)
    elbo = make()
    Case("k", elbo.num_particles, x=none).check(elbo, alpha, of_x=0.0)


@objectives
def test_a_masked_data_point_adds_nothing(make, alpha):
    elbo = make()
    _, whole_grads = Case("uk", elbo.num_particles).run(elbo)
    mask = torch.arange(whole_grads.shape[1]).unsqueeze(-1) % 3 > 0
    _, grads = Case("uk", elbo.num_particles, k=mask, u=mask, x=mask).run(elbo)
    torch.testing.assert_close(grads, torch.where(mask.squeeze(-1), whole_grads, 0))


@pytest.mark.parametrize("name", ["IWAE 1", "IWAE 2", "Renyi 0.5", "MeanField 1"])
@pytest.mark.parametrize("order", ["u", "ku"])
def test_a_gaussian_by_its_score(name, order):
    """has_rsample is switched off, so that the score has to give what the path gave."""
    elbo, alpha = OBJECTIVES[name][0](), OBJECTIVES[name][1]
    case = Case(order, elbo.num_particles, noise=MANY, scored=True)
    case.check(elbo, alpha, tolerance=1e-4)


class Given(Messenger):
    """Draw these, one particle after the other."""

    def __init__(self, **values):
        super().__init__()
        self.values = {name: iter(rows) for name, rows in values.items()}

    def _pyro_sample(self, msg):
        if msg["name"] in self.values and msg["value"] is None:
            msg["value"] = next(self.values[msg["name"]])


@pytest.mark.parametrize(("num_data", "nats"), [(1, 0.1), (2, 0.2)])
def test_free_bits_bind_all_draws_together(num_data, nats):
    """By the maximum over the batch: all draws of two data, or of two particles of one, are tried."""
    particles, free = 3 - num_data, torch.tensor(2 * nats, dtype=torch.float64)
    elbo = pv.FreeBits(nats, particles, vectorize_particles=False)
    theta = THETA.clone().requires_grad_()
    x = torch.tensor([X, -0.5], dtype=torch.float64)[:num_data]

    def p_a():
        return dist.Bernoulli(logits=theta[0])

    def p_b(a):
        return dist.Bernoulli(logits=theta[1] + a)

    def p_x(a, b):
        return dist.Normal(theta[2] * a + 2 * b, 0.8)

    def q_a():
        return dist.Bernoulli(logits=theta[4] * x)

    def q_b(a):
        return dist.Bernoulli(logits=theta[5] * x - 0.7 * a)

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", p_a())
            pyro.sample("x", p_x(a, pyro.sample("b", p_b(a))), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("b", q_b(pyro.sample("a", q_a())))

    elbo.loss(model, guide, x)
    found = exact = torch.zeros(())
    clamped = set()
    for draws in itertools.product([0.0, 1.0], repeat=4):
        a, b = torch.tensor(draws, dtype=torch.float64).reshape(2, particles, num_data)
        with Given(a=a, b=b):
            loss = elbo.differentiable_loss(model, guide, x)
        kls = kl_divergence(q_a(), p_a()).sum() * particles, kl_divergence(q_b(a), p_b(a)).sum()
        clamped.add(bool(kls[1] < free))
        bound = p_x(a, b).log_prob(x).sum() - sum(torch.maximum(kl, free) for kl in kls)
        torch.testing.assert_close(loss, -bound / particles)
        prob = (q_a().log_prob(a) + q_b(a).log_prob(b)).sum().exp()
        found = found + prob.detach() * torch.autograd.grad(loss, theta)[0]
        exact = exact - prob * bound / particles
    torch.testing.assert_close(found, torch.autograd.grad(exact, theta)[0])
    assert clamped == {True, False}


# Noise.


def variance(elbo):
    """Of the gradient of the guide's parameters, over all tuples."""
    case = Case("k", elbo.num_particles)
    _, grads = case.run(elbo)
    probs, _ = case.expected(0)
    mean = (probs * grads).sum(1, keepdim=True)
    return (probs * (grads - mean).square()).sum(1)[4:].sum().item()


@pytest.mark.parametrize("make", [lambda: pv.IWAE(3), lambda: pv.Renyi(0.5, 3), lambda: pv.MeanField(3)])
def test_the_other_particles_take_noise_away(make, monkeypatch):
    found = variance(make())
    for room in (importance, kl):
        monkeypatch.setattr(room, "gain", bound)
    assert found < 0.5 * variance(make())


def test_what_is_impossible_is_no_baseline():
    added = gain(torch.tensor([[0.0], [-math.inf], [-math.inf]]))
    torch.testing.assert_close(added, torch.tensor([[-math.log(3)], [0.0], [0.0]]))


# Drawn as they come.


class Counts(PyroModule):
    """z ~ Poisson(2), x ~ N(a z, 1); q(z | x) = Poisson(exp(b x)). a and b are (copies,)."""

    def __init__(self, copies):
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.full((copies,), v, dtype=torch.float64)) for v in (0.4, 0.6))

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Poisson(torch.tensor(2.0, dtype=torch.float64)))
            pyro.sample("x", dist.Normal(self.a * z, 1.0), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Poisson((self.b * x).exp()))


@pytest.mark.parametrize("make", [lambda: pv.IWAE(2), lambda: pv.MeanField(2)])
def test_draws_of_a_poisson(make):
    """Within five standard errors, which together are less than a tenth of the gradient."""
    elbo, one, copies = make(), Counts(1), 200_000
    z, x = torch.arange(40.0, dtype=torch.float64), torch.tensor(X, dtype=torch.float64)
    log_q = dist.Poisson((one.b * x).exp()).log_prob(z)
    log_w = dist.Poisson(torch.tensor(2.0)).log_prob(z) + dist.Normal(one.a * z, 1.0).log_prob(x) - log_q
    pairs = torch.stack(torch.broadcast_tensors(log_w.unsqueeze(0), log_w.unsqueeze(1)))
    bounds = pairs.logsumexp(0) - math.log(2) if isinstance(elbo, pv.IWAE) else pairs.mean(0)
    exact = torch.autograd.grad(-(log_q.exp() @ bounds @ log_q.exp()), [one.a, one.b])
    pair = Counts(copies)
    loss = elbo.differentiable_loss(pair.model, pair.guide, x.expand(copies))
    for of_one, found in zip(exact, torch.autograd.grad(loss, [pair.a, pair.b]), strict=True):
        error = 5 * found.std() / math.sqrt(copies)
        assert (found.mean() - of_one).abs() < error < 0.1 * of_one.abs()


class Labels(PyroModule):
    """y ~ Categorical(1/3), z ~ N(0, I), x ~ Bernoulli(f(y, z)); q(y | x) q(z | x, y)."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.Sequential(pv.MLP(5, 8, 6), pv.Bernoulli())
        self.classifier = nn.Linear(6, 3)
        self.encoder = nn.Sequential(pv.MLP(9, 8, 4), pv.DiagNormal())

    def model(self, x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(torch.ones(3) / 3))
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", self.decoder(torch.cat([torch.eye(3)[y], z], -1)), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(logits=self.classifier(x)))
            pyro.sample("z", self.encoder(torch.cat([x.expand(*y.shape, 6), torch.eye(3)[y]], -1)))


TAKEN = {
    "IWAE": lambda: pv.IWAE(5),
    "IWAE, one by one": lambda: pv.IWAE(3, vectorize_particles=False),
    "Renyi": lambda: pv.Renyi(0.5, 3),
    "MeanField": lambda: pv.MeanField(3),
    "FreeBits": lambda: pv.FreeBits(0.1, 2),
}
taken = pytest.mark.parametrize("make", TAKEN.values(), ids=TAKEN)


@taken
def test_compiled_is_eager(make):
    x = data(size=12)
    runs = []
    for loss in (make(), pv.CompiledELBO(make(), backend="eager")):
        torch.manual_seed(0)
        pair = Labels()
        svi = pv.SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 1e-2}), loss=loss)
        torch.manual_seed(1)
        losses = torch.tensor([svi.step(x) for _ in range(5)])
        runs.append([losses, *(p.detach() for p in pair.parameters())])
    for eager, compiled in zip(*runs, strict=True):
        torch.testing.assert_close(compiled, eager)


@taken
def test_the_loss_is_that_without_gradients(make):
    """The score adds a gradient and no value; where it has none to add, it is not made."""
    pair, x, elbo = Labels(), data(), make()
    elbo.loss(pair.model, pair.guide, x)
    found = []
    for run in (elbo.loss, elbo.loss_and_grads, elbo.differentiable_loss):
        torch.manual_seed(3)
        found.append(torch.as_tensor(run(pair.model, pair.guide, x)).item())
    assert found == pytest.approx(found[:1] * 3, rel=1e-6)
    pair.classifier.requires_grad_(False)
    with pytest.MonkeyPatch.context() as patch:
        for room in (importance, kl):
            patch.setattr(room, "by_score", None)
        elbo.loss_and_grads(pair.model, pair.guide, x)


@taken
def test_training_finds_the_posterior_of_a_discrete_latent(make):
    model, x = references.Mixture(), torch.randn(20, 2, dtype=torch.float64)
    logits = nn.Parameter(torch.zeros(20, 3, dtype=torch.float64))

    class Guide(PyroModule):
        def __init__(self):
            super().__init__()
            self.logits = logits

        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Categorical(logits=self.logits))

    elbo = make()
    svi = pv.SVI(model.requires_grad_(False), Guide(), pyro.optim.Adam({"lr": 0.1}), loss=elbo)
    for _ in range(50):
        svi.step(x)
    gap = model.evidence(x) - references.mixture_elbo(model, dist.Categorical(logits=logits), x)
    start = model.evidence(x) - references.mixture_elbo(model, dist.Categorical(logits=0 * logits), x)
    assert gap.mean() < 0.3 * start.mean()


# What explain says, and what is refused.


def test_what_explain_and_compare_elbos_say():
    pair, x = Labels(), data()
    estimators = {"IWAE": pv.IWAE(3), "MeanField": pv.MeanField(2), "Trace": Trace_ELBO()}
    for elbo in estimators.values():
        terms = {term.site: term for term in pv.explain(pair.model, pair.guide, elbo, x).terms}
        assert (terms["y"].draw, terms["z"].draw) == ("score function", "reparameterised")
    compared = pv.compare_elbos(pair.model, pair.guide, x, estimators, num_draws=3)
    assert {record["estimator"] for record in compared.records} == set(estimators)


@pytest.mark.parametrize("elbo", [pv.STL(), pv.DReG(2), TraceMeanField_ELBO()])
def test_who_needs_a_path_refuses(elbo):
    pair, x = Labels(), data()
    mine = isinstance(elbo, Objective)
    message = (
        "'y'.*Categorical: expected a distribution with rsample.*got one that is not.* MeanField or IWAE"
    )
    svi = pv.SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 1e-2}), loss=elbo)
    for run in (lambda: svi.step(x), lambda: pv.explain(pair.model, pair.guide, elbo, x)):
        with pytest.raises(ValueError, match=message):
            run()
    if mine:
        with torch.no_grad():
            elbo.differentiable_loss(pair.model, pair.guide, x)  # the value needs none


@pytest.mark.parametrize("has_rsample", [True, False])
@taken
def test_a_score_needs_its_data_point(make, has_rsample):
    """A site outside the plate "data" is no data point's; the value of MeanField may have one."""

    class Shift(PyroModule):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.zeros(()))

        def model(self, x):
            shift = pyro.sample("shift", dist.Normal(torch.zeros(()), 1.0))
            with pyro.plate("data", len(x)):
                k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.5)))
                pyro.sample("x", dist.Normal(k + shift, 1.0), obs=x)

        def guide(self, x):
            pyro.sample("shift", dist.Normal(self.loc, 1.0).has_rsample_(has_rsample))
            with pyro.plate("data", len(x)):
                pyro.sample("k", dist.Bernoulli(logits=self.loc))

    pair, elbo = Shift(), make()
    with pytest.raises(ValueError, match="'shift': expected it inside the plate 'data', got the plates none"):
        elbo.differentiable_loss(pair.model, pair.guide, torch.zeros(3))
    if isinstance(elbo, pv.MeanField):
        assert math.isfinite(elbo.loss(pair.model, pair.guide, torch.zeros(3)))
