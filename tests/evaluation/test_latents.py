"""What a latent site carries, against closed forms."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from registry import STRUCTURES, data, pair
from torch import nn
from torch.distributions import Independent

import pyro_vae as pv


@pytest.fixture
def linear():
    torch.manual_seed(0)
    model, guide = pv.references.linear_gaussian()
    x = torch.randn(400, 5).double()
    return model, guide, x


def test_kl_and_spread_are_the_closed_forms(linear):
    model, guide, x = linear
    with torch.no_grad():
        mean, log_sigma = guide.encoder[0](x).chunk(2, -1)
    kl = 0.5 * ((2 * log_sigma).exp() + mean**2 - 1 - 2 * log_sigma)  # (N, D)
    runs = [pv.latent_terms(model, guide, x, num_samples=8)["z"] for _ in range(40)]
    for ours, exact in (
        (torch.stack([run.kl.mean() for run in runs]), kl.sum(-1).mean()),
        (torch.stack([run.kl_per_dimension for run in runs]), kl.mean(0)),
        (torch.stack([run.spread for run in runs]), mean.var(0)),
    ):
        error = ours.std(0) / math.sqrt(len(runs))
        assert (error < 0.05).all()
        assert ((ours.mean(0) - exact).abs() < 4 * error).all()
    assert runs[0].kl.shape == (400,)
    torch.testing.assert_close(runs[0].kl.mean(), runs[0].kl_per_dimension.sum())


def test_a_unit_that_ignores_the_data_is_not_active(linear):
    model, guide, x = linear
    with torch.no_grad():
        guide.encoder[0].weight[[1, 3]] = 0.0  # mean and log sigma of z_2
    # Noise of unit size in every draw, and a threshold of 0.01: it has to be taken off.
    terms = pv.latent_terms(model, guide, x, num_samples=30)["z"]
    assert terms.active.tolist() == [True, False]
    assert terms.spread[1].abs() < 0.01


def test_a_collapsed_posterior_is_told(linear):
    model, guide, x = linear
    with torch.no_grad():
        guide.encoder[0].weight.zero_()
        guide.encoder[0].bias.zero_()
    with pytest.warns(UserWarning, match=r"collapse at site 'z': 0 of its 2.*KL is -?0\.0\d\d nats"):
        terms = pv.latent_terms(model, guide, x, num_samples=30)["z"]
    assert not terms.active.any()


class TopDown(PyroModule):
    """p(z2) p(z1 | z2) p(x | z1), and a guide in which z2 says all and z1 follows its prior."""

    def __init__(self, guide=False):
        super().__init__()
        self.guide = guide

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(x, 0.5) if self.guide else dist.Normal(0.0, 1.0))
            with pyro.plate("pixels", 3):
                z1 = pyro.sample("z1", dist.Normal(z2, 1.0))
            if not self.guide:
                pyro.sample("x", dist.Normal(z1.sum(0), 1.0), obs=x)


def test_each_site_has_its_own_terms():
    x = torch.randn(300)
    with pytest.warns(UserWarning, match="site 'z1': 3 of its 3 dimensions are active and its KL is 0.000"):
        terms = pv.latent_terms(TopDown(), TopDown(guide=True), x, num_samples=100)
    kl = 0.5 * (0.25 + x**2 - 1 - math.log(0.25))
    assert terms["z2"].kl.mean().item() == pytest.approx(kl.mean().item(), abs=0.05)
    assert terms["z2"].spread.item() == pytest.approx(x.var().item(), rel=0.03)
    assert terms["z1"].kl_per_dimension.shape == terms["z1"].spread.shape == (3,)
    torch.testing.assert_close(terms["z1"].spread, x.double().var().expand(3), rtol=0.05, atol=0)


def test_a_mask_hides_a_data_point(linear):
    model, guide, x = linear
    mask = torch.arange(len(x)) < 100
    masked = [pyro.poutine.mask(program, mask=mask) for program in (model, guide)]
    terms = pv.latent_terms(*masked, x, num_samples=2)["z"]
    assert not terms.kl[100:].any()
    torch.testing.assert_close(terms.kl.mean(), terms.kl_per_dimension.sum())


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.filterwarnings("ignore:Posterior collapse")
def test_any_structure_has_terms(name):
    make, width = STRUCTURES[name]
    model, guide = make()
    x = data(size=50, width=width)
    terms = pv.latent_terms(model, guide, x, num_samples=20)["z"]
    products = all(isinstance(fn, Independent) for fn in (model.prior(), guide.encoder(x)))
    assert (terms.kl_per_dimension is not None) == products
    assert terms.spread.shape == (2,)
    many = pv.elbo_terms(model, guide, x.repeat(200, 1)).kl.double()
    error = many.std() * (2 / (50 * 20)) ** 0.5
    assert (terms.kl.mean() - many.mean()).abs() < 5 * error


@pytest.mark.parametrize(
    ("size", "num_samples", "message"),
    [
        (8, 1, "num_samples: expected a whole number of at least 2, got 1"),
        (1, 3, "batch: expected at least 2 data points, .*got 1"),
    ],
)
def test_too_few_are_refused(size, num_samples, message):
    with pytest.raises(ValueError, match=message):
        pv.latent_terms(*pair(), data(size=size), num_samples)


def test_sites_without_a_posterior_or_a_plate_are_refused():
    class Mixed(PyroModule):
        def forward(self, x):
            with pyro.plate("data", len(x)):
                k = pyro.sample("k", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
                z = pyro.sample("z", dist.Normal(k.float(), 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    class Outside(PyroModule):
        def __init__(self, observe):
            super().__init__()
            self.observe, self.unused = observe, nn.Identity()

        def forward(self, x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(x)):
                if self.observe:
                    pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    class Guide(PyroModule):
        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x, 1.0))

    with pytest.raises(
        ValueError, match=r"\['k'\] of the model: expected them in the guide, since latent_terms does not"
    ):
        pv.latent_terms(Mixed(), Guide(), torch.randn(4))
    with pytest.raises(ValueError, match="'z': expected it inside the plate 'data', got the plates none"):
        pv.latent_terms(Outside(observe=True), Outside(observe=False), torch.randn(4))
