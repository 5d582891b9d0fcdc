"""What all objectives of this package share: exact expectations, particles, and how they are used."""

import math

import pyro
import pytest
import torch
from every_objective import EVERY, OBJECTIVES, every
from exact_bounds import check_unbiased, flat, quadrature
from gaussian_pairs import Chain, Deep, posterior_chain
from pyro.nn import PyroModule
from registry import data, pair
from torch import nn

import pyro_vae as pv
from pyro_vae.evaluation import references

# Against quadrature.


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


@pytest.mark.parametrize("beta", [1.0, 0.3])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_value_and_gradient_are_those_of_quadrature(name, beta):
    elbo, alpha = OBJECTIVES[name]
    model, guide = references.linear_gaussian(width=3, dim=1)
    references.set_to_posterior(model, guide, spread=1.3)
    guide.encoder[0].bias.data[0] += 0.3
    x = torch.randn(3, 3, dtype=torch.float64)
    check_unbiased(elbo, model, guide, x, quadrature(model, guide, x, alpha=alpha, beta=beta), beta=beta)


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


# Particles.


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
        losses.append(elbo(3, vectorize_particles=side_by_side).loss(model, guide, x))
    assert losses[0] == pytest.approx(losses[1])


def test_dropout_in_the_decoder_leaves_particles_side_by_side():
    _, guide = pair()
    model = Normed(nn.Dropout(0.5))
    elbo = pv.IWAE(3)
    elbo.loss(model, guide, data())
    assert elbo.max_plate_nesting == 2  # the plates of the data and of the particles


@pytest.mark.parametrize("side_by_side", [True, False])
def test_all_particles_are_of_the_data_that_a_plate_draws(side_by_side):
    """At the exact posterior a weight is the evidence of its data point, and a mixture of data is seen."""
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


@every
def test_an_objective_is_a_module_and_is_evaluated(elbo):
    model, guide = pair()
    x = data()
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


# Arguments.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pv.IWAE(0), "num_particles: expected a positive whole number, got 0"),
        (lambda: pv.STL(1.5), "num_particles: expected a positive whole number, got 1.5"),
        (lambda: pv.Renyi(math.nan, 2), "alpha: expected a finite number, got nan"),
        (lambda: pv.FreeBits(-1.0), "nats: expected a finite number of 0 or more, got -1.0"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
