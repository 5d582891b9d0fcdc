"""The model observes, the guide draws: where they do not, every tool refuses."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.contrib import cevae
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from registry import data, pair
from torch import nn

import pyro_vae as pv


def adam(lr=1e-2):
    return pyro.optim.Adam({"lr": lr})


def step(elbo):
    return lambda model, guide, x: pv.SVI(model, guide, adam(), loss=elbo()).step(x)


def compiled(elbo):
    return step(lambda: pv.CompiledELBO(elbo(), backend="eager"))


def loss(elbo):
    elbo = elbo()  # one for all calls
    return lambda model, guide, x: elbo.loss(model, guide, x)


TOOLS = {
    "Trace_ELBO": step(Trace_ELBO),
    "TraceMeanField_ELBO": step(TraceMeanField_ELBO),
    "TraceGraph_ELBO": step(TraceGraph_ELBO),
    "Trace_ELBO, compiled": compiled(Trace_ELBO),
    "MeanField, compiled": compiled(pv.MeanField),
    "evaluate_loss": lambda model, guide, x: pv.SVI(model, guide, adam(), Trace_ELBO()).evaluate_loss(x),
    "fit": lambda model, guide, x: next(
        pv.fit(pv.SVI(model, guide, adam(), Trace_ELBO()), [x], 1, progress=False)
    ),
    "log_evidence": lambda model, guide, x: pv.log_evidence(model, guide, x, 3),
    "log_evidence, compiled": lambda model, guide, x: pv.log_evidence(model, guide, x, 3, compiled=True),
    "elbo_terms": pv.elbo_terms,
    "latent_terms": pv.latent_terms,
    "reconstruct": pv.reconstruct,
    "explain": lambda model, guide, x: pv.explain(model, guide, Trace_ELBO(), x),
    "compare_elbos": lambda model, guide, x: pv.compare_elbos(model, guide, x, {"Trace": Trace_ELBO()}, 2),
    **{
        f"{name} alone": loss(elbo)
        for name, elbo in {
            "IWAE": lambda: pv.IWAE(2),
            "Renyi": lambda: pv.Renyi(0.5, 2),
            "STL": pv.STL,
            "DReG": lambda: pv.DReG(2),
            "MeanField": pv.MeanField,
            "FreeBits": lambda: pv.FreeBits(0.1),
        }.items()
    },
}


class Program(nn.Module):
    """A model or guide of one function, with the parts of a pair."""

    def __init__(self, run):
        super().__init__()
        self.run = run
        model, guide = pair()
        self.prior, self.decoder, self.encoder = model.prior, model.decoder, guide.encoder

    def forward(self, x):
        with pyro.plate("data", len(x)):
            return self.run(self, x)


def z_from_encoder(self, x):
    return pyro.sample("z", self.encoder(x))


def and_observe(name):
    def run(self, x):
        pyro.sample(name, self.decoder(z_from_encoder(self, x)), obs=x)

    return run


def z_from_prior(self, x):
    return pyro.sample("z", self.prior())


def forgotten(self, x):
    return pyro.sample("x", self.decoder(z_from_prior(self, x)))


SWAPPED = "The guide: expected it to draw latents, got one that observes '{}'.*are model and guide swapped"
NO_OBS = r"The model: expected a site with obs=, got {} without one: was obs= forgotten, or.*swapped"
# name -> (() -> (model, guide), the error)
WRONG = {
    "swapped": (lambda: pair()[::-1], SWAPPED.format("x")),
    "a guide that observes": (lambda: (pair()[0], Program(and_observe("aux"))), SWAPPED.format("aux")),
    "a model without a likelihood": (lambda: (Program(z_from_prior), pair()[1]), NO_OBS.format("'z'")),
    "a model without obs=": (lambda: (Program(forgotten), pair()[1]), NO_OBS.format("'x', 'z'")),
}


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("wrong", ["swapped", "a guide that observes", "a model without obs="])
def test_every_tool_refuses_wrong_roles(tool, wrong):
    make, message = WRONG[wrong]
    programs = make()
    for _ in range(2):
        with pyro.validation_enabled(False), pytest.raises(ValueError, match=message):
            TOOLS[tool](*programs, data())


@pytest.mark.parametrize("tool", ["Trace_ELBO", "log_evidence", "reconstruct"])
def test_a_model_without_a_likelihood_is_refused(tool):
    make, message = WRONG["a model without a likelihood"]
    with pytest.raises(ValueError, match=message):
        TOOLS[tool](*make(), data())


@pytest.mark.parametrize("tool", ["Trace_ELBO", "log_evidence"])
def test_a_guide_that_observes_a_latent_of_the_model_is_refused(tool):
    with pytest.raises(ValueError, match=SWAPPED.format("x")):
        TOOLS[tool](Program(forgotten), Program(and_observe("x")), data())


@pytest.mark.parametrize("tool", TOOLS)
def test_one_program_on_both_sides_is_refused(tool):
    model, _ = pair()
    message = "the same one on both sides|as the model does, and .* would count it as log q"
    with pytest.raises(ValueError, match=message):
        TOOLS[tool](model, model, data())
    with pytest.raises(ValueError, match=message):
        TOOLS[tool](model.forward, model.forward, data())


def test_generate_asks_where_nothing_is_observed():
    model, guide = pair()

    def factor(x):
        with pyro.plate("data", len(x)):
            pyro.factor("f", pyro.sample("z", dist.Normal(0.0, 1.0)))

    for program, sites in ((guide, "'z'"), (Program(forgotten), "'x', 'z'"), (factor, "'f', 'z'")):
        with pytest.raises(ValueError, match=NO_OBS.format(sites)):
            pv.generate(program, data())
    assert list(pv.generate(model, data())) == ["x"]


# What is right.


def test_a_factor_is_an_observation():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
            pyro.factor("x", dist.Normal(z, 1.0).log_prob(x))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, math.sqrt(0.5)))

    x = torch.randn(4)
    # The guide is the posterior, so that every draw gives -log p(x).
    expected = -dist.Normal(0.0, math.sqrt(2.0)).log_prob(x).sum().item()
    for elbo in (Trace_ELBO(), pv.IWAE(2), pv.STL()):
        assert elbo.loss(model, guide, x) == pytest.approx(expected)
    assert pv.explain(model, guide, Trace_ELBO(), x).elbo == pytest.approx(-expected)


def test_a_prior_for_a_guide_is_no_copy_of_the_model():
    """Likelihood weighting: the guide is the model without its observations."""
    model, _ = pair()
    x = data(size=3)
    guide = poutine.block(model, hide_types=["observe"])
    z = model.prior().sample((20_000,))
    expected = model.decoder(z[:, None]).log_prob(x).logsumexp(0) - math.log(len(z))
    found = pv.log_evidence(model, guide, x, 20_000).values
    torch.testing.assert_close(found, expected.detach(), atol=0.05, rtol=0)


# Sites that both observe: the causal effect VAE of pyro.contrib.


@pytest.fixture
def causal():
    sizes = {"feature_dim": 2, "latent_dim": 1, "hidden_dim": 4, "num_layers": 2, "outcome_dist": "normal"}
    model, guide = cevae.Model(sizes), cevae.Guide(sizes)
    return model, guide, (torch.randn(6, 2), (torch.rand(6) < 0.5).float(), torch.randn(6))


def log_joint(model, z, x, t, y):
    """log p(z) + log p(x | z) + log p(t | z) + log p(y | t, z)"""
    factors = ((model.z_dist(), z), (model.x_dist(z), x), (model.t_dist(z), t), (model.y_dist(t, z), y))
    return sum(p.log_prob(value) for p, value in factors)


@pytest.mark.parametrize("compiled", [False, True])
def test_log_evidence_leaves_out_what_both_observe(causal, compiled):
    model, guide, batch = causal
    z = torch.linspace(-9, 9, 3001).reshape(-1, 1, 1).expand(-1, 6, 1)
    exact = log_joint(model, z, *batch).logsumexp(0) + math.log(18 / 3000)
    found = pv.log_evidence(model, guide, batch, 20_000, compiled=compiled)
    assert ((found.values - exact.detach()).abs() < 5 * found.standard_error).all()
    assert found.standard_error.max() < 0.1


def test_elbo_terms_leave_out_what_both_observe(causal):
    model, guide, (x, t, y) = causal
    torch.manual_seed(1)
    elbo, reconstruction, kl = pv.elbo_terms(model, guide, (x, t, y))
    torch.manual_seed(1)
    q, p = guide.z_dist(y, t, x), model.z_dist()
    z = q.sample()
    expected = log_joint(model, z, x, t, y) - p.log_prob(z)
    torch.testing.assert_close(reconstruction, expected.detach())
    torch.testing.assert_close(kl, (q.log_prob(z) - p.log_prob(z)).detach())
    torch.testing.assert_close(elbo, reconstruction - kl)


def test_reconstruct_returns_what_both_observe(causal):
    assert list(pv.reconstruct(*causal)) == ["x", "t", "y"]


@pytest.mark.parametrize("elbo", [Trace_ELBO, pv.MeanField, pv.STL, lambda: pv.IWAE(2)])
def test_an_objective_without_rules_for_it_is_refused(causal, elbo):
    model, guide, batch = causal
    message = "observes 't', 'y', as the model does, and .* would count it as log q.*TraceCausalEffect_ELBO"
    with pytest.raises(ValueError, match=message):
        pv.SVI(model, guide, adam(), elbo()).step(*batch)
    if elbo is not Trace_ELBO:
        with pytest.raises(ValueError, match=message):
            elbo().loss_and_grads(model, guide, *batch)


def test_the_causal_effect_elbo_trains_as_in_pyro(causal):
    model, guide, batch = causal
    elbo = cevae.TraceCausalEffect_ELBO()
    torch.manual_seed(1)
    expected = elbo.loss(model, guide, *batch)
    for loss in (elbo, pv.CompiledELBO(elbo, backend="eager")):
        svi = pv.SVI(model, guide, torch.optim.SGD(pv.parameters(model, guide), lr=0.0), loss)
        torch.manual_seed(1)
        assert svi.step(*batch) == pytest.approx(expected)
    before = guide.t_nn.fc[0].weight.clone()
    pv.SVI(model, guide, adam(), elbo).step(*batch)
    assert not torch.equal(before, guide.t_nn.fc[0].weight)


def test_explain_says_what_the_causal_effect_elbo_adds(causal):
    model, guide, (x, t, y) = causal
    found = pv.explain(model, guide, cevae.TraceCausalEffect_ELBO(), x, t, y)
    terms = {term.site: term for term in found.terms}
    assert sum(term.share for term in found.terms) == pytest.approx(found.elbo)
    assert terms["t"].role == "observed"
    assert terms["t"].why == "E_q[log p] at the guide's draws, and what TraceCausalEffect_ELBO makes of log q"
    assert terms["t"].nats == terms["t"].share < 0


# A batch for which a loss has no term.


class Classifier(nn.Module):
    """The auxiliary loss of a semi-supervised VAE: -log q(y | x) of the labelled batches alone."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 4)

    def model(self, x, y=None):
        with pyro.plate("data", len(x)):
            if y is not None:
                pyro.sample("y", dist.Categorical(logits=self.net(x)), obs=y)

    def guide(self, x, y=None):
        """Draw nothing."""


OBJECTIVES = {
    "Trace_ELBO": Trace_ELBO,
    "TraceMeanField_ELBO": TraceMeanField_ELBO,
    "TraceGraph_ELBO": TraceGraph_ELBO,
    "TraceEnum_ELBO": lambda: TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False),
    "RenyiELBO": lambda: RenyiELBO(num_particles=2, max_plate_nesting=1, vectorize_particles=True),
    "IWAE": lambda: pv.IWAE(2),
    "STL": pv.STL,
    "DReG": lambda: pv.DReG(2),
    "MeanField": pv.MeanField,
    "FreeBits": lambda: pv.FreeBits(0.1),
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_batch_without_a_site_has_the_loss_0_and_trains_nothing(name, compiled):
    both, elbo = Classifier(), OBJECTIVES[name]()
    x, y = torch.randn(5, 3), torch.randint(0, 4, (5,))
    loss = pv.CompiledELBO(elbo, backend="eager") if compiled else elbo
    svi = pv.SVI(both.model, both.guide, adam(), loss)
    for _ in range(2):
        before = both.net.weight.clone()
        assert svi.step(x) == svi.evaluate_loss(x) == 0 == svi.num_data(x)
        torch.testing.assert_close(both.net.weight, before, rtol=0, atol=0)
        expected = dist.Categorical(logits=both.net(x)).log_prob(y).sum()
        assert svi.step(x, y) == pytest.approx(-expected.item(), rel=1e-5)
        assert svi.num_data(x, y) == 5
        assert not torch.equal(both.net.weight, before)
    if name != "RenyiELBO":  # Pyro's fails
        assert elbo.loss(both.model, both.guide, x) == 0
    assert pv.explain(both.model, both.guide, elbo, x, y).terms[0].share == pytest.approx(
        dist.Categorical(logits=both.net(x)).log_prob(y).sum().item(), rel=1e-5
    )


def test_a_batch_without_a_site_has_no_evidence():
    both = Classifier()
    for tool in (pv.log_evidence, pv.elbo_terms, pv.reconstruct):
        with pytest.raises(ValueError, match="expected a site with obs=, got no site"):
            tool(both.model, both.guide, torch.randn(5, 3))
