"""generate and reconstruct."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from mixture_pairs import CENTRES, Mixture, components
from pyro import poutine
from pyro.nn import PyroModule

import pyro_vae as pv
from pyro_vae.evaluation import references


def test_generation_ignores_the_data_and_follows_the_prior():
    model, _ = references.linear_gaussian(sigma=0.1)
    x = torch.full((20_000, 5), 7.0, dtype=torch.float64)
    drawn = pv.generate(model, x)["x"].sample()
    weight, bias = model.decoder[0].weight.detach(), model.decoder[0].bias.detach()
    covariance = weight @ weight.T + 0.01 * torch.eye(5)
    torch.testing.assert_close(drawn.mean(0), bias, atol=0.05, rtol=0)
    torch.testing.assert_close(drawn.T.cov(), covariance, atol=0.05, rtol=0.05)


@pytest.fixture
def linear():
    model, guide = references.linear_gaussian()
    references.set_to_posterior(model, guide, spread=1.3)
    return model, guide, torch.randn(50, 5, dtype=torch.float64)


def test_reconstruction_goes_through_the_guide(linear):
    model, guide, x = linear
    torch.manual_seed(2)
    reconstructed = pv.reconstruct(model, guide, x)["x"].mean
    torch.manual_seed(2)
    z = guide.encoder(x).rsample()
    torch.testing.assert_close(reconstructed, model.decoder(z).mean)


class Exact(PyroModule):
    """p(z | x) of the mixture."""

    def forward(self, x):
        k = torch.arange(3)
        posteriors = dist.Normal((CENTRES * 4 + x[:, None] - k) / 5, math.sqrt(0.2))
        with pyro.plate("data", len(x)):
            mixing = dist.Categorical(logits=components(x))
            pyro.sample("z", dist.MixtureSameFamily(mixing, posteriors))


def test_reconstruction_draws_an_enumerated_site_from_its_posterior():
    x = torch.full((20_000,), 1.0)
    reconstructed = pv.reconstruct(Mixture(), Exact(), x)
    assert list(reconstructed) == ["x"]
    mean = reconstructed["x"].mean
    # k | x first, then z | k, x: E[z + k | x]
    weights = components(x[:1]).softmax(-1)[0]
    k = torch.arange(3)
    expected = (weights * ((CENTRES * 4 + 1.0 - k) / 5 + k)).sum()
    assert mean.mean().item() == pytest.approx(expected.item(), abs=5 * mean.std().item() / math.sqrt(len(x)))


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


class Classes(PyroModule):
    """y ~ Categorical, z ~ N(0, I); class k lights pixel k; z_0 shifts nothing."""

    def forward(self, x, y=None):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(torch.ones(3)), obs=y)
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            logits = 20 * torch.eye(3)[y] - 10 + 0 * z[..., :1]
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)


def held(name, value, how):
    """generate's arguments to hold a site."""
    if how == "given":
        return {"model": Classes(), "given": {name: value}}
    return {"model": pyro.condition(Classes(), data={name: value})}


@pytest.mark.parametrize("how", ["given", "condition"])
@pytest.mark.parametrize("batch", ["data", "data and labels", "number"])
def test_a_class_that_is_given_or_conditioned_on_holds(how, batch):
    x, y = torch.zeros(60, 3), torch.full((60,), 2)
    batch = {"data": x, "data and labels": (x, torch.zeros_like(y)), "number": 60}[batch]
    generated = pv.generate(batch=batch, **held("y", y, how))
    assert list(generated) == ["x"]
    assert (generated["x"].mean.argmax(-1) == 2).all()


def test_a_condition_around_the_call_holds_and_what_is_given_goes_before_a_condition(linear):
    model, _, x = linear
    z = torch.linspace(-3, 3, 50, dtype=torch.float64)[:, None].expand(50, 2).contiguous()
    for conditioned, given in (
        (pyro.condition(model, data={"z": z}), None),
        (pyro.condition(model, data={"z": 0 * z}), {"z": z}),
    ):
        torch.testing.assert_close(pv.generate(conditioned, x, given=given)["x"].mean, model.decoder(z).mean)
    with pyro.condition(data={"z": z}):
        torch.testing.assert_close(pv.generate(model, x)["x"].mean, model.decoder(z).mean)


@pytest.mark.parametrize("batch", [torch.zeros(60, 3), 60], ids=["data", "number"])
@pytest.mark.parametrize("how", ["given", "condition"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            torch.tensor([2]),
            r"Site 'y', which is given: expected a tensor of shape \(60,\).* shape \(1,\)",
        ),
        (2, r"Site 'y', which is given: expected a tensor of shape \(60,\).*got 2\. To fix"),
        (torch.full((60,), 3), "Site 'y' of the model, Categorical: expected .* outside its support"),
    ],
)
def test_a_given_value_that_does_not_fit_is_refused(how, value, message, batch):
    with pytest.raises(ValueError, match=f"^{message}"):
        pv.generate(batch=batch, **held("y", value, how))


def test_a_given_value_of_a_single_site_is_a_tensor_too():
    with pytest.raises(ValueError, match=r"^Site 'weight', which is given: .* shape \(\).*got 2\.0\. To fix"):
        pv.generate(takes_number, 7, given={"weight": 2.0})
    assert (pv.generate(takes_number, 7, given={"weight": torch.tensor(2.0)})["x"].mean == 2).all()


def test_a_condition_on_the_trace_of_a_guide_holds_with_its_plates(linear):
    model, guide, x = linear
    trace = poutine.trace(guide).get_trace(x)
    generated = pv.generate(pyro.condition(model, data=trace), x)["x"]
    torch.testing.assert_close(generated.mean, model.decoder(trace.nodes["z"]["value"]).mean)


def test_what_would_be_dropped_is_refused():
    x, y = torch.zeros(60, 3), torch.full((60,), 2)
    with pytest.raises(ValueError, match=r"given: expected sites .* \['x', 'y', 'z'\], got \['k'\]"):
        pv.generate(Classes(), x, given={"k": y})
    with pytest.raises(ValueError, match="Site 'y' of the model: expected it to be given, since 'x' depends"):
        pv.generate(Classes(), (x, y))
    with pytest.raises(ValueError, match="expected an observed site to generate"):
        pv.generate(Classes(), x, given={"x": x})

    def through_a_latent(x, y):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Normal(torch.zeros(()), 1.0), obs=y)
            z = pyro.sample("z", dist.Normal(y, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match="Site 'y' of the model: expected it to be given, since 'x' depends"):
        pv.generate(through_a_latent, (torch.zeros(60), torch.zeros(60)))
    # The two ways that the message names.
    assert list(pv.generate(Classes(), (x, y), given={"y": y})) == ["x"]
    drawn = pv.generate(poutine.uncondition(Classes()), (x, y))
    assert list(drawn) == ["y", "x"]
    assert len(drawn["x"].mean.argmax(-1).unique()) == 3


def test_observed_sites_that_do_not_depend_on_each_other_are_all_generated():
    def model(a, b):
        with pyro.plate("data", len(a)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("a", dist.Normal(z, 1.0), obs=a)
            pyro.sample("b", dist.Normal(z, 1.0), obs=b)

    assert list(pv.generate(model, (torch.zeros(4), torch.zeros(4)))) == ["a", "b"]


def with_size(size):
    """A model of a batch of data, whose number it reads by ``size``."""

    def model(x):
        with pyro.plate("data", size(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return model


def takes_number(number):
    weight = pyro.sample("weight", dist.Normal(torch.zeros(()), 1.0))
    with pyro.plate("data", number):
        pyro.sample("x", dist.Normal(weight, 1.0), obs=torch.zeros(number))


def test_a_number_is_enough_for_a_model_that_needs_no_more(linear):
    sizes = (len, lambda x: x.shape[0], lambda x: x.size(0))
    for model in (linear[0], takes_number, *map(with_size, sizes)):
        assert pv.generate(model, 7)["x"].batch_shape == (7,)


def reads_data(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z + x, 1.0), obs=x)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (reads_data, "expected data, since this program reads them, got only their number, 7"),
        (with_size(lambda x: x.shape[-1]), "expected data, since this program reads them"),
        (with_size(lambda x: x.size(-1)), "expected data, since this program reads them"),
        (with_size(lambda x: sum(x.shape)), "expected data, since this program reads them"),
        (with_size(lambda x: 5), r"Site 'x': expected 7 of it, .* got batch shape \(5,\)"),
    ],
)
def test_a_number_is_refused_by_a_model_that_needs_more(model, message):
    with pytest.raises(ValueError, match=message):
        pv.generate(model, 7)
    pv.generate(model, torch.zeros(5))


def test_a_number_to_generate_is_positive(linear):
    with pytest.raises(ValueError, match="batch: expected a positive whole number, got 0"):
        pv.generate(linear[0], 0)


def test_a_dependence_that_cannot_be_seen_is_refused():
    """The classes y are written into h, so that x depends on them unseen."""

    def program(x, y):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(torch.ones(3)), obs=y)
            h = torch.zeros(len(x), 3)
            h[torch.arange(len(x)), y] = 10.0
            pyro.sample("x", dist.Normal(h, 1.0).to_event(1), obs=x)

    x, y = torch.zeros(4, 3), torch.tensor([0, 1, 2, 1])
    with pytest.raises(ValueError, match="Site 'x' .*but the operation __setitem__ hides it.*given="):
        pv.generate(program, (x, y))
    found = pv.generate(program, (x, y), given={"y": y})
    assert found["x"].mean.argmax(1).tolist() == y.tolist()


def test_a_number_hides_no_dependence():
    def program(number):
        with pyro.plate("data", number):
            y = pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.full((number,), 7.0))
            pyro.sample("x", dist.Normal(y, 1.0), obs=torch.zeros(number))

    with pytest.raises(ValueError, match="'x' depends on it and generate would drop the values"):
        pv.generate(program, 3)
