"""Every tool works on every registered pair: training, compiling, objectives, evaluation, saving."""

import copy
import io
import math

import pyro
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from registry import STRUCTURES, data, has_kl

import pyro_vae as pv

each_structure = pytest.mark.parametrize("name", STRUCTURES)


def structure(name, size=8, dtype=torch.float64):
    make, width = STRUCTURES[name]
    model, guide = make()
    return model.to(dtype), guide.to(dtype), data(size=size, width=width).to(dtype)


def adam(lr=1e-2):
    return pyro.optim.Adam({"lr": lr})


def losses(svi, x, steps=20):
    torch.manual_seed(5)
    return [svi.step(x) for _ in range(steps)]


@each_structure
def test_it_trains_as_under_pyro(name):
    model, guide, x = structure(name, size=16)
    twins = copy.deepcopy((model, guide))
    before = [p.clone() for p in pv.parameters(model, guide)]
    ours = losses(pv.SVI(model, guide, adam(), loss=TraceMeanField_ELBO()), x, 40)
    assert sum(ours[-10:]) < sum(ours[:10])
    for old, p in zip(before, pv.parameters(model, guide), strict=True):
        assert not torch.equal(old, p)
    theirs = losses(pyro.infer.SVI(*twins, adam(), loss=TraceMeanField_ELBO()), x, 40)
    assert ours == pytest.approx(theirs, rel=1e-6)
    copy.deepcopy((model, guide))  # no tensor of a graph is left in it


ELBOS = {
    "trace": Trace_ELBO,
    "mean-field": TraceMeanField_ELBO,
    "renyi": lambda: RenyiELBO(alpha=0, num_particles=3, vectorize_particles=True, max_plate_nesting=1),
}


@pytest.mark.parametrize(
    ("name", "elbo"),
    [
        *((name, "trace") for name in STRUCTURES),
        ("flow-normal, standard-normal", "renyi"),
        ("diag-normal, vamp", "mean-field"),
    ],
)
def test_compiled_steps_are_those_of_eager(name, elbo):
    model, guide, x = structure(name)
    twins = copy.deepcopy((model, guide))
    eager = losses(pv.SVI(model, guide, adam(), loss=ELBOS[elbo]()), x, 4)
    compiled = pv.CompiledELBO(ELBOS[elbo](), backend="eager")
    assert losses(pv.SVI(*twins, adam(), loss=compiled), x, 4) == pytest.approx(eager, rel=1e-5)


def grid(side=161, reach=9.0):
    """A square grid over the plane, and the area of its cells."""
    line = torch.linspace(-reach, reach, side, dtype=torch.float64)
    return torch.cartesian_prod(line, line), (line[1] - line[0]) ** 2


@each_structure
@torch.no_grad()
def test_evidence_and_elbo_are_those_of_quadrature(name):
    model, guide, x = structure(name, size=3)
    z, area = grid()
    log_prior = model.prior().log_prob(z)
    assert (log_prior.exp().sum() * area).item() == pytest.approx(1, abs=1e-3)
    joint = log_prior[:, None] + model.decoder(z[:, None]).log_prob(x)  # (grid, N)
    exact = joint.logsumexp(0) + area.log()
    estimate = pv.log_evidence(model, guide, x, 10_000)
    assert ((estimate.values - exact).abs() < 5 * estimate.standard_error + 1e-4).all()
    assert estimate.standard_error.max() < 0.05

    log_q = guide.encoder(x).log_prob(z[:, None])
    q = log_q.exp() * area
    torch.testing.assert_close(q.sum(0), torch.ones(3).double(), rtol=1e-3, atol=0)
    elbo, kl = (q * (joint - log_q)).sum(0), (q * (log_q - log_prior[:, None])).sum(0)
    many = pv.elbo_terms(model, guide, x.repeat(4000, 1))
    for ours, theirs in ((many.elbo, elbo), (many.kl, kl)):
        ours = ours.unflatten(0, (4000, 3))
        assert ((ours.mean(0) - theirs).abs() < 5 * ours.std(0) / math.sqrt(4000) + 1e-4).all()


@each_structure
def test_the_gradient_of_the_elbo_is_that_of_quadrature(name):
    model, guide, x = structure(name, size=1)
    z, area = grid(side=601)  # fine: at the kinks of ReLU the integrand jumps
    log_q = guide.encoder(x).log_prob(z)
    joint = model.prior().log_prob(z) + model.decoder(z).log_prob(x)
    exact = torch.autograd.grad((log_q.exp() * area * (log_q - joint)).sum(), pv.parameters(model, guide))
    draws, copies = 20, x.expand(1000, -1)
    sampled = []
    for _ in range(draws):
        loss = Trace_ELBO().differentiable_loss(model, guide, copies) / 1000
        sampled.append(torch.autograd.grad(loss, pv.parameters(model, guide)))
    for theirs, ours in zip(exact, map(torch.stack, zip(*sampled, strict=True)), strict=True):
        error = ours.std(0) / math.sqrt(draws)
        assert ((ours.mean(0) - theirs).abs() < 6 * error + 2e-3).all()


@each_structure
def test_every_objective_agrees_on_it(name):
    """With one draw all are the same ELBO; with five draws IWAE is a higher bound."""
    model, guide, x = structure(name)
    optimizer = torch.optim.SGD(pv.parameters(model, guide), lr=0.0)

    def step(elbo):
        torch.manual_seed(0)
        return pv.SVI(model, guide, optimizer, loss=elbo).step(x)

    plain = step(Trace_ELBO())
    for elbo in (pv.IWAE(1), pv.STL(), pv.DReG(1)):
        assert step(elbo) == pytest.approx(plain)
    if not has_kl(guide.encoder(x), model.prior()):
        assert step(pv.MeanField()) == pytest.approx(plain)

    def losses_of(elbo):
        return torch.tensor([elbo.loss(model, guide, x) for _ in range(60)])

    mean_field, one, five = map(losses_of, (pv.MeanField(), pv.IWAE(1), pv.IWAE(5)))
    assert (mean_field.mean() - one.mean()).abs() < 5 * ((mean_field.var() + one.var()) / 60) ** 0.5
    assert five.mean() < one.mean() + 3 * ((five.var() + one.var()) / 60) ** 0.5
    assert step(pv.DReG(5)) == pytest.approx(step(pv.IWAE(5)))


@each_structure
def test_it_generates_and_reconstructs(name):
    model, guide, x = structure(name)
    assert pv.generate(model, x)["x"].sample().shape == x.shape
    assert pv.reconstruct(model, guide, x)["x"].mean.shape == x.shape


@each_structure
def test_saved_parameters_are_complete(name):
    model, guide, x = structure(name)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "guide": guide.state_dict()}, file)
    torch.manual_seed(0)
    expected = pv.log_evidence(model, guide, x, 10).values
    other_model, other_guide, _ = structure(name)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other_model.load_state_dict(saved["model"])
    other_guide.load_state_dict(saved["guide"])
    torch.manual_seed(0)
    found = pv.log_evidence(other_model, other_guide, x, 10).values
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
