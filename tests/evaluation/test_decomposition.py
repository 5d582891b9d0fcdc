"""kl_decomposition against closed forms: separated posteriors, Gaussian codes, and a sum by quadrature."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.evaluation import decomposition


class At(nn.Module):
    """q(z | x) = N(x, sigma^2 I)."""

    def __init__(self, sigma):
        super().__init__()
        self.sigma = sigma

    def forward(self, x):
        with pyro.plate("data", len(x)):
            return pyro.sample("z", dist.Normal(x, self.sigma).to_event(1))


def model_of(prior=None):
    return pv.Model(prior or pv.StandardNormal(2), nn.Sequential(nn.Linear(2, 2), pv.Gaussian(1.0)))


def test_far_apart_every_part_is_known():
    # Two posteriors in opposite corners: z tells which, and one dimension tells the other.
    x = torch.tensor([[-30.0, -30.0], [30.0, 30.0]]).repeat(400, 1)
    found = pv.kl_decomposition(model_of(), At(0.5), x, 10)["z"]
    assert found.mutual_information.item() == pytest.approx(math.log(2), abs=1e-5)
    assert found.total_correlation.item() == pytest.approx(math.log(2), abs=1e-5)
    kl = 0.5 * (0.5**2 + 30**2 - 1) - math.log(0.5)
    draws = 15 / math.sqrt(len(x) * 10)  # the sd of z^2 / 2 is 30 * 0.5
    torch.testing.assert_close(
        found.dimension_kl,
        torch.full((2,), kl - math.log(2), dtype=torch.float64),
        atol=5 * draws,
        rtol=0,
    )


def test_equal_posteriors_say_nothing():
    found = pv.kl_decomposition(model_of(), At(0.5), torch.full((5, 2), 0.3), 10)["z"]
    assert found.mutual_information.abs() < 1e-6
    assert found.total_correlation.abs() < 1e-6
    torch.testing.assert_close(found.kl, found.dimension_kl.sum())


def test_a_gaussian_code_has_the_closed_forms():
    covariance, noise = torch.tensor([[1.0, 0.8], [0.8, 1.0]]), 0.7
    x = dist.MultivariateNormal(torch.zeros(2), covariance).sample((2000,))
    found = pv.kl_decomposition(model_of(), At(noise), x, 3)["z"]
    code = covariance + noise**2 * torch.eye(2)  # of q(z)
    exact = {
        "mutual_information": 0.5 * torch.logdet(code) - 2 * math.log(noise),
        "total_correlation": -0.5 * (1 - (code[0, 1] / code[0, 0]) ** 2).log(),
        "dimension_kl": (0.5 * (code[0, 0] - 1 - code[0, 0].log())).expand(2),
    }
    for name, value in exact.items():
        error = found.standard_error[name]
        assert ((getattr(found, name) - value).abs() < 4 * error).all(), name
        assert (error < 0.03).all()


def test_the_parts_add_up_and_match_latent_terms():
    guide, x = At(0.5), torch.randn(300, 2)
    found = pv.kl_decomposition(model_of(), guide, x, 50)["z"]
    torch.testing.assert_close(found.kl, found.mutual_information + found.marginal_kl)
    torch.testing.assert_close(found.marginal_kl, found.total_correlation + found.dimension_kl.sum())
    kl = pv.latent_terms(model_of(), guide, x, 50)["z"].kl.mean()
    assert abs(found.kl - kl) < 0.1
    exact = (0.5 * (x.square() + 0.25 - 1) - math.log(0.5)).sum(-1).mean()
    assert abs(found.kl - exact) < 0.02


def test_the_mixture_of_a_few_overlapping_posteriors_by_quadrature():
    x = torch.tensor([[-0.4, 0.0], [0.9, 0.0], [0.2, 0.0]])
    found = pv.kl_decomposition(model_of(), At(0.6), x.repeat(400, 1), 20)["z"]
    grid = torch.linspace(-8, 8, 20_001, dtype=torch.float64)
    q = dist.Normal(x[:, :1].double(), 0.6).log_prob(grid)
    q_z = q.logsumexp(0) - math.log(3)
    step = float(grid[1] - grid[0])
    information = (q.exp() * (q - q_z)).sum(-1).mean() * step
    of_prior = (q_z.exp() * (q_z - dist.Normal(0.0, 1.0).log_prob(grid))).sum() * step
    draws = 1 / math.sqrt(1200 * 20)
    assert abs(found.mutual_information - information) < 4 * draws
    assert abs(found.dimension_kl[0] - of_prior) < 4 * draws


def test_data_in_blocks_give_the_same(monkeypatch):
    x, found = torch.randn(30, 2), []
    for numbers in (2**22, 250):  # all draws at once, and four at a time
        monkeypatch.setattr(decomposition, "_NUMBERS", numbers)
        torch.manual_seed(1)
        found.append(pv.kl_decomposition(model_of(), At(0.5), x)["z"])
    for name in ("mutual_information", "total_correlation", "dimension_kl"):
        torch.testing.assert_close(getattr(found[0], name), getattr(found[1], name))


@pytest.mark.parametrize(
    ("family", "width"), [(pv.FullNormal(), 5), (pv.FlowNormal(2, steps=1, hidden=4, context=3), 7)]
)
def test_other_families_have_the_parts_that_exist(family, width):
    encoder = nn.Sequential(nn.Linear(2, width), family)
    x = torch.randn(40, 2)
    found = pv.kl_decomposition(model_of(), pv.Guide(encoder), x, 5)["z"]
    assert found.total_correlation is None is found.dimension_kl
    assert 0 < found.mutual_information < math.log(40) + 1e-6
    torch.testing.assert_close(found.kl, found.mutual_information + found.marginal_kl)


def test_a_prior_that_is_no_product_has_no_parts_by_dimension():
    found = pv.kl_decomposition(model_of(pv.MixturePrior(2, 3)), At(0.5), torch.randn(20, 2))["z"]
    assert found.total_correlation is None
    assert found.marginal_kl.isfinite()


class Both(nn.Module):
    """Two latents of each object on a page, with or without an arrow between them."""

    def __init__(self, arrow):
        super().__init__()
        self.arrow = arrow

    def forward(self, x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(x[:, 0], 0.5))
            pyro.sample("b", dist.Normal(a if self.arrow else x[:, 1], 0.5))


class Prior(nn.Module):
    def __init__(self, arrow):
        super().__init__()
        self.arrow = arrow

    def forward(self, x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(torch.zeros(len(x)), 1.0))
            b = pyro.sample("b", dist.Normal(a if self.arrow else torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(torch.stack([a, b], -1), 1.0).to_event(1), obs=x)


def test_several_latents_each_by_itself():
    x = torch.randn(500, 2)
    found = pv.kl_decomposition(Prior(False), Both(False), x, 4)
    assert found.keys() == {"a", "b"}
    for parts in found.values():
        exact = 0.5 * math.log(1.25 / 0.25)
        assert abs(parts.mutual_information - exact) < 5 * parts.standard_error["mutual_information"]
        assert parts.total_correlation == 0


@pytest.mark.parametrize(
    ("model", "guide", "side"), [(Prior(False), Both(True), "guide"), (Prior(True), Both(False), "model")]
)
def test_a_latent_that_depends_on_another_is_refused(model, guide, side):
    with pytest.raises(ValueError, match=f"Site 'b' of the {side}: expected .* depends on no other latent"):
        pv.kl_decomposition(model, guide, torch.randn(5, 2))


def test_what_has_no_average_posterior_is_refused():
    with pytest.raises(ValueError, match="at least 2 data points"):
        pv.kl_decomposition(model_of(), At(0.5), torch.randn(1, 2))
    masked = pyro.poutine.mask(At(0.5), mask=torch.tensor([True, False]))
    with pytest.raises(ValueError, match="expected no masks on latents|mask"):
        pv.kl_decomposition(model_of(), masked, torch.randn(2, 2))
    with pytest.raises(ValueError, match="num_samples"):
        pv.kl_decomposition(model_of(), At(0.5), torch.randn(2, 2), 0)


def test_nothing_moves_but_the_random_state():
    guide = pv.Guide(nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 4), pv.DiagNormal()))
    before = {name: value.clone() for name, value in guide.state_dict().items()}
    pv.kl_decomposition(model_of(), guide, torch.randn(10, 2))
    assert guide.training
    for name, value in guide.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_notebook_shows_the_parts():
    found = pv.kl_decomposition(model_of(), At(0.5), torch.randn(10, 2))["z"]
    assert "mutual information" in found._repr_html_()
    assert "nats per data point" in found._repr_html_()
