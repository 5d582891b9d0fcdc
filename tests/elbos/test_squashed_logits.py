"""A sigmoid or a softmax right before a distribution that takes logits: a warning at the first batch."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO
from registry import LIKELIHOODS, data, pair
from torch import nn

import pyro_vae as pv


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, h):
        return self.function(h)


def messages(decoder, x, elbo=None):
    """The warnings of two steps."""
    guide = pair()[1]
    svi = pv.SVI(
        pv.Model(pv.StandardNormal(2), decoder), guide, pyro.optim.Adam({"lr": 1e-3}), elbo or Trace_ELBO()
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        svi.step(x)
        svi.step(x)
    return [str(warning.message) for warning in caught]


def decoder_of(likelihood, *squash):
    family = LIKELIHOODS[likelihood](6)
    return nn.Sequential(nn.Linear(2, family.num_features(6)), *squash, family)


SQUASHES = {
    "Sigmoid": (lambda: [nn.Sigmoid()], "sigmoid"),
    "Softmax": (lambda: [nn.Softmax(-1)], "softmax"),
    "a function": (lambda: [Function(torch.sigmoid)], "sigmoid"),
    "then another shape": (lambda: [nn.Sigmoid(), nn.Unflatten(1, (1, -1)), nn.Flatten(1)], "sigmoid"),
}
TAKE_LOGITS = {
    "bernoulli": "Bernoulli",
    "continuous-bernoulli": "ContinuousBernoulli",
    "categorical": "Categorical",
}


@pytest.mark.parametrize("squash", SQUASHES)
@pytest.mark.parametrize("likelihood", TAKE_LOGITS)
def test_squashed_logits_are_warned_of_once(likelihood, squash):
    make, name = SQUASHES[squash]
    (message,) = messages(decoder_of(likelihood, *make()), data(likelihood))
    assert message.startswith(f"Site 'x' of the model, {TAKE_LOGITS[likelihood]}: expected logits")
    assert message.endswith(f"To fix: leave the {name} out.")


FORMS = {
    "alias": torch.ops.aten.alias,
    "clone": torch.clone,
    "permute": lambda h: h.permute(1, 0).permute(1, 0),
    "reshape": lambda h: h.t().reshape(6, -1, 1).reshape(6, -1).t(),
    "reshape by a copy": lambda h: h.t().reshape(-1).reshape(6, -1).t(),
    "select": lambda h: h[None][0],
    "slice": lambda h: h[:],
    "squeeze": lambda h: h.unsqueeze(-1).squeeze(-1),
    "t": lambda h: h.t().t(),
    "to": lambda h: h.double().float(),
    "transpose": lambda h: h.transpose(0, 1).transpose(0, 1),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_no_change_of_form_hides_them(form):
    decoder = decoder_of("bernoulli", Function(lambda h: form(torch.sigmoid(h))))
    assert len(messages(decoder, data())) == 1


@pytest.mark.parametrize(
    "squash",
    [
        nn.Identity(),
        nn.Tanh(),
        nn.SiLU(),
        Function(lambda h: 10 * torch.sigmoid(h) - 5),  # bounds chosen on purpose
        Function(lambda h: torch.sigmoid(h) * h),  # a gate
        Function(lambda h: h - torch.sigmoid(h)),
    ],
)
@pytest.mark.parametrize("likelihood", TAKE_LOGITS)
def test_other_networks_are_not(likelihood, squash):
    assert not messages(decoder_of(likelihood, squash), data(likelihood))


@pytest.mark.parametrize(
    "change", [lambda p: 10 * p, lambda p: p / 0.1, lambda p: p.clamp(0.1, 0.9)], ids=["*", "/", "clamp"]
)
@pytest.mark.parametrize("likelihood", TAKE_LOGITS)
def test_a_changed_sigmoid_is_not(likelihood, change):
    squash = Function(lambda h: change(torch.sigmoid(h)))
    assert not messages(decoder_of(likelihood, squash), data(likelihood))


@pytest.mark.parametrize("likelihood", sorted(LIKELIHOODS.keys() - TAKE_LOGITS.keys()))
def test_families_without_logits_may_have_a_sigmoid(likelihood):
    assert not messages(decoder_of(likelihood, nn.Sigmoid()), data(likelihood))


@pytest.mark.parametrize(
    ("likelihood", "warned"),
    [
        (lambda p: dist.Bernoulli(logits=p), True),
        (lambda p: dist.Bernoulli(p), False),
        (lambda p: dist.Binomial(3, logits=p), True),
        (lambda p: dist.Binomial(3, probs=p), False),
    ],
)
def test_distributions_of_pyro(likelihood, warned):
    decoder = nn.Sequential(nn.Linear(2, 6), nn.Sigmoid(), Function(lambda p: likelihood(p).to_event(1)))
    assert len(messages(decoder, data())) == warned


def test_logits_that_are_parameters():
    decoder = nn.Sequential(nn.Linear(2, 6), nn.Sigmoid(), Function(lambda p: dist.Bernoulli(p).to_event(1)))
    decoder.logits = nn.Parameter(torch.zeros(6))
    for logits in (lambda p: decoder.logits, lambda p: decoder.logits.expand(p.shape)):
        decoder[2].function = lambda p, logits=logits: dist.Bernoulli(logits=logits(p)).to_event(1)
        assert not messages(decoder, data())


@pytest.mark.parametrize("normalise", [False, True])
def test_a_classifier_in_the_guide(normalise):
    net = nn.Sequential(nn.Linear(6, 3), *[nn.Softmax(-1)] * normalise)

    class Program(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def model(self, x):
            with pyro.plate("data", len(x)):
                k = pyro.sample("k", dist.Categorical(torch.ones(3)))
                pyro.sample("x", dist.Normal(k[:, None].float(), 1.0).expand([len(x), 6]).to_event(1), obs=x)

        def guide(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("k", dist.Categorical(logits=self.net(x)))

    both = Program()
    svi = pv.SVI(both.model, both.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        svi.step(torch.randn(4, 6))
    assert len(caught) == normalise
    assert all("'k' of the guide, Categorical: expected logits" in str(each.message) for each in caught)


@pytest.mark.parametrize(
    "elbo",
    [
        lambda: pv.IWAE(2),
        lambda: pv.CompiledELBO(Trace_ELBO(), backend="eager"),
        lambda: RenyiELBO(num_particles=2, max_plate_nesting=1, vectorize_particles=True),
    ],
)
def test_under_other_objectives(elbo):
    assert len(messages(decoder_of("bernoulli", nn.Sigmoid()), data(), elbo())) == 1
