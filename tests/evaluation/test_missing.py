"""impute and conditional_evidence against closed forms, in one block and in many."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from observed_entries import conditional, evidence, linear
from pyro.nn import PyroModule
from torch import nn

import pyro_vae as pv
from pyro_vae.evaluation import references, weights


def holes(x, share=0.4):
    return x.masked_fill(torch.rand(x.shape) < share, math.nan)


class Guide(PyroModule):
    """z ~ N(0, 1), whatever x is."""

    def forward(self, x, *others):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))


def nothing(x):
    """The guide of a model whose latents are all summed out."""


# Imputation.


@pytest.mark.parametrize("samples", [128, 24])
def test_the_mean_is_the_conditional_mean(samples, monkeypatch):
    monkeypatch.setattr(weights, "SAMPLES", samples)
    monkeypatch.setattr(weights, "ROWS", 20 * samples)
    model, guide, x = linear(30)
    filled = pv.impute(model, guide, x, 6000)["x"]
    seen = ~x.isnan()
    for values in filled:
        assert values.dtype == x.dtype
        assert torch.equal(values[seen], x[seen])
    errors = []
    for row, mean in zip(x, filled.mean, strict=True):
        exact, covariance = conditional(model, row)
        errors.append((mean[row.isnan()] - exact) / covariance.diagonal().sqrt())
    # In units of the conditional's deviation: a few over the root of the effective number of samples.
    errors = torch.cat(errors)
    assert errors.abs().max() < 0.2
    assert errors.square().mean().sqrt() < 0.05


@pytest.mark.parametrize("samples", [128, 8])
def test_draws_have_the_conditional_mean_and_covariance(samples, monkeypatch):
    monkeypatch.setattr(weights, "SAMPLES", samples)
    monkeypatch.setattr(weights, "ROWS", 500 * samples)
    model, guide, x = linear()
    row = x[int((x.isnan().sum(-1) == 3).nonzero()[0])]
    draws = pv.impute(model, guide, row.expand(6000, 5), 160)["x"].draw[:, row.isnan()]
    mean, covariance = conditional(model, row)
    deviations = covariance.diagonal().sqrt()
    # Each standard error is below the deviation over the root of 6000, that of a covariance twice as large.
    assert ((draws.mean(0) - mean).abs() / deviations).max() < 0.06
    assert ((draws.T.cov() - covariance).abs() / deviations.outer(deviations)).max() < 0.09


def test_a_draw_is_by_weight_among_all_blocks(monkeypatch):
    monkeypatch.setattr(weights, "SAMPLES", 1)
    monkeypatch.setattr(weights, "ROWS", 4000)

    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.1))
            pyro.sample("x", dist.Normal(k, 1e-3), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Bernoulli(0.5))

    draws = pv.impute(model, guide, torch.full((4000,), math.nan), 40)["x"].draw
    assert draws.mean().item() == pytest.approx(0.1, abs=0.02)


def test_binary_pixels_of_a_mixture():
    """p(x_m = 1 | x_o) is a sum over the components, which the model enumerates, or the guide draws."""
    probs = torch.tensor([[0.9, 0.1, 0.8, 0.2], [0.1, 0.7, 0.3, 0.9], [0.5, 0.95, 0.9, 0.05]])
    prior = torch.tensor([0.5, 0.2, 0.3])

    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(prior), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Bernoulli(probs[k]).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Categorical(torch.tensor([0.4, 0.3, 0.3])))

    x = torch.tensor([[1.0, math.nan, 0.0, math.nan], [math.nan, 1.0, math.nan, 0.0], [math.nan] * 4])
    seen = ~x.isnan()
    of_entry = dist.Bernoulli(probs).log_prob(x.nan_to_num().unsqueeze(1)) * seen.unsqueeze(1)
    joint = prior.log() + of_entry.sum(-1)
    exact = torch.where(seen, x, joint.softmax(-1) @ probs)
    for q, num_samples in ((nothing, 4000), (guide, 4000)):
        torch.testing.assert_close(pv.impute(model, q, x, num_samples)["x"].mean, exact, atol=0.03, rtol=0)
        draws = pv.impute(model, q, x.repeat(2000, 1), 30)["x"].draw.reshape(2000, 3, 4)
        assert draws.unique().tolist() == [0, 1]
        torch.testing.assert_close(draws.mean(0), exact, atol=0.05, rtol=0)
    values = pv.log_evidence(*pv.mask_missing(model, nothing), x, 2).values
    torch.testing.assert_close(values, joint.logsumexp(-1))


def test_the_mixture_of_gaussians():
    model = references.Mixture()
    x = holes(torch.randn(40, 2, dtype=torch.float64), 0.5)
    densities = dist.Normal(model.means, model.sigma).log_prob(x.nan_to_num().unsqueeze(1))
    joint = model.logits.log_softmax(-1) + (densities * ~x.isnan().unsqueeze(1)).sum(-1)
    exact = torch.where(x.isnan(), joint.softmax(-1) @ model.means, x).detach()
    mean = pv.impute(model, nothing, x, 4000)["x"].mean
    torch.testing.assert_close(mean, exact, atol=0.15, rtol=0)


def test_all_sites_are_drawn_with_one_latent():
    def model(x, y, label):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1e-3 * torch.ones(2)).to_event(1), obs=x)
            pyro.sample("y", dist.Normal(-z, 1e-3), obs=y)
            pyro.sample("label", dist.Bernoulli(logits=z), obs=label)

    x, y, label = torch.full((500, 2), math.nan), torch.full((500,), math.nan), torch.ones(500)
    filled = pv.impute(model, Guide(), (x, y, label), 200)
    assert filled.keys() == {"x", "y", "label"}
    draw = filled["x"].draw
    torch.testing.assert_close(draw[:, 0], draw[:, 1], atol=0.01, rtol=0)
    torch.testing.assert_close(draw[:, 0], -filled["y"].draw, atol=0.01, rtol=0)
    assert torch.equal(filled["label"].draw, label)
    assert 0.2 < draw.mean() < 0.6  # E[z | label = 1] = 0.41
    torch.testing.assert_close(filled["x"].mean.mean(), torch.tensor(0.413), atol=0.03, rtol=0)


@pytest.mark.parametrize("one_by_one", [False, True])
def test_plates_inside_a_data_point(one_by_one):
    def model(x):
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            if one_by_one and z.dim() > 2:
                raise RuntimeError("no particles side by side")
            with pyro.plate("columns", 3, dim=-1):
                pyro.sample("x", dist.Normal(z, 0.1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(x.sum(-1, keepdim=True) / (~x.eq(0)).sum(-1, keepdim=True), 0.1))

    x = torch.tensor([[0.5, math.nan, 0.3], [math.nan, -1.0, math.nan]])
    filled = pv.impute(model, guide, x, 300)["x"]
    exact = torch.tensor([[0.5, 0.398, 0.3], [-0.990, -1.0, -0.990]])
    torch.testing.assert_close(filled.mean, exact, atol=0.02, rtol=0)
    torch.testing.assert_close(filled.draw, exact, atol=0.6, rtol=0)


def test_data_that_are_not_the_first_dimension_of_a_site_come_first():
    def model(x):
        with pyro.plate("columns", 2, dim=-2), pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Normal(torch.tensor([[3.0], [5.0]]), 1e-3), obs=x.T)

    x = torch.tensor([[1.0, math.nan], [math.nan, 2.0], [math.nan, math.nan]])
    filled = pv.impute(model, nothing, x, 3)["x"]
    exact = torch.tensor([[1.0, 5.0], [3.0, 2.0], [3.0, 5.0]])
    torch.testing.assert_close(filled.mean, exact)
    torch.testing.assert_close(filled.draw, exact, atol=0.01, rtol=0)


def test_without_nan_all_is_as_it_was():
    model, guide, x = linear(5, share=0.0)
    x = x.nan_to_num(1.5)
    assert all(torch.equal(each, x) for each in pv.impute(model, guide, x, 3)["x"])


def test_a_family_without_a_mean_still_has_draws():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Cauchy(z, 1.0), obs=x)

    x = torch.tensor([1.0, math.nan])
    filled = pv.impute(model, Guide(), x, 20)["x"]
    assert filled.mean[0] == 1
    assert filled.mean[1].isnan()
    assert filled.draw.isfinite().all()


def test_entries_that_are_joint_given_z_are_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            loc = z.unsqueeze(-1) * torch.ones(3)
            pyro.sample("x", dist.NanMaskedMultivariateNormal(loc, torch.eye(3)), obs=x)

    with pytest.raises(ValueError, match=r"'x' of the model, NanMasked.*: expected a product over entries"):
        pv.impute(model, Guide(), holes(torch.randn(6, 3)), 5)


# Conditional evidence.


def test_conditional_evidence_is_the_gaussian_conditional():
    model, guide, x = linear(40, share=0.2)
    given = torch.rand(x.shape) < 0.5
    estimate = pv.conditional_evidence(model, guide, x, given, 4000)
    exact = evidence(model, x) - evidence(model, x.masked_fill(~given, math.nan))
    assert ((estimate.values - exact).abs() < 5 * estimate.standard_error).all()
    assert estimate.standard_error.max() < 0.1


def test_it_takes_other_arguments_and_its_error_is_that_of_both_parts():
    class Shifted(nn.Module):
        def __init__(self, program):
            super().__init__()
            self.program = program

        def forward(self, x, shift):
            return self.program(x - shift)

    model, guide, x = linear(10, share=0.0)
    x, shift = x.nan_to_num(0.5), torch.ones(10, 5).double()
    given = torch.arange(5).expand_as(x) < 2
    runs = [
        pv.conditional_evidence(Shifted(model), Shifted(guide), (x + 1, shift), given, 300) for _ in range(40)
    ]
    spread = torch.stack([run.values for run in runs]).std(0)
    estimated = torch.stack([run.standard_error for run in runs]).mean(0)
    assert 0.8 < (spread / estimated).median() < 1.25
    exact = evidence(model, x) - evidence(model, x.masked_fill(~given, math.nan))
    mean = torch.stack([run.values for run in runs]).mean(0)
    assert ((mean - exact).abs() < 5 * spread / math.sqrt(40) + 1e-3).all()


@pytest.mark.parametrize(
    ("given", "got"),
    [
        (torch.ones(3, 5), "a tensor of torch.float32"),
        (torch.ones(5, dtype=torch.bool), r"a tensor of shape \(5,\)"),
        (None, "None"),
    ],
)
def test_another_mask_is_refused(given, got):
    model, guide, x = linear(4)
    with pytest.raises(ValueError, match=rf"given: expected a bool tensor of shape \(4, 5\).*got {got}"):
        pv.conditional_evidence(model, guide, x, given)


def test_other_data_are_refused():
    model, guide, x = linear(4)
    with pytest.raises(ValueError, match="batch: expected floats, for NaN to mark some, got torch.int64"):
        pv.conditional_evidence(model, guide, x.nan_to_num().long(), x.isnan())
    with pytest.raises(ValueError, match="num_samples: expected a positive whole number, got 0"):
        pv.impute(model, guide, x, 0)
