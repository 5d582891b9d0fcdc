"""explain: the rows say what a site is, the values are the closed forms, and nothing is moved."""

import copy
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import (
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule
from registry import LIKELIHOODS, POSTERIORS, data, has_kl, pair
from torch import nn

import pyro_vae as pv
from pyro_vae.evaluation import references


def rows(explanation):
    return {term.site: term for term in explanation.terms}


@pytest.fixture
def case():
    model, guide = references.linear_gaussian()
    return model, guide, torch.randn(4, 5, dtype=torch.float64)


def test_the_values_are_the_closed_forms(case):
    """The KL exactly; what is sampled within five standard errors, far less than a factor of 2."""
    model, guide, x = case
    reconstruction = references.reconstruction(model, guide, x).sum().item()
    kl = references.kl(guide, x).sum().item()
    many = {"num_particles": 4_000, "vectorize_particles": True}
    terms = rows(pv.explain(model, guide, TraceMeanField_ELBO(**many), x))
    assert terms["x"].nats == pytest.approx(reconstruction, abs=2.8)  # sd of one draw: 36
    assert abs(reconstruction) > 50
    assert terms["z"].nats == pytest.approx(kl, rel=1e-9)
    assert terms["z"].estimate == "closed form"
    terms = rows(pv.explain(model, guide, Trace_ELBO(**many), x))
    assert terms["z"].nats == pytest.approx(kl, abs=0.4)  # sd of one draw: 4
    assert kl > 3
    assert terms["z"].estimate == "Monte Carlo"


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO, TraceGraph_ELBO, TraceEnum_ELBO])
def test_the_shares_add_up_to_the_loss_for_the_same_seed(elbo):
    model, guide = pair()
    x = data()
    estimator = elbo(num_particles=3, max_plate_nesting=1, strict_enumeration_warning=False)
    explanation = pv.explain(model, guide, estimator, x)
    assert sum(term.share for term in explanation.terms) == pytest.approx(explanation.elbo, rel=1e-5)
    assert explanation.elbo == pytest.approx(-estimator.loss(model, guide, x), rel=1e-6)
    assert explanation.note == ""


def test_the_row_of_a_site(case):
    model, guide, x = case
    assert rows(pv.explain(model, guide, TraceMeanField_ELBO(), x))["z"][:-2] == (
        "z",
        "latent",
        "Normal",
        "Normal",
        "data 4",
        (4,),
        (2,),
        "1",
        "",
        "reparameterised",
        "closed form",
        "KL(Normal || Normal) is registered",
    )


def test_it_prints_and_renders(case):
    explanation = pv.explain(*case[:2], TraceMeanField_ELBO(), case[2])
    title, _, head, line, z, x, total, *_ = str(explanation).splitlines()
    assert title.startswith("TraceMeanField_ELBO, 1 draw")
    assert head.split()[:4] == ["site", "role", "model", "guide"]
    assert len(line) == len(head) == len(z) == len(x) == len(total)
    assert set(line) == {"-"}
    assert total.endswith(f"{explanation.elbo:.2f}")
    html = explanation._repr_html_()
    assert html.count("<tr>") == 4
    assert "KL(Normal || Normal) is registered" in html
    named = explanation._replace(terms=(explanation.terms[0]._replace(site="<z>"),))
    assert "<th>&lt;z&gt;</th>" in named._repr_html_()


def test_it_moves_nothing():
    model, _ = pair()
    net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 4), pv.DiagNormal())
    guide = pv.Guide(net)
    estimator = RenyiELBO(0, num_particles=2, vectorize_particles=True)
    x = data()
    before = copy.deepcopy((model.state_dict(), guide.state_dict(), torch.get_rng_state(), vars(estimator)))
    pv.explain(model, guide, estimator, x)
    after = (model.state_dict(), guide.state_dict(), torch.get_rng_state(), vars(estimator))
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert not pyro.get_param_store()
    assert guide.training
    assert all(p.grad is None for p in pv.parameters(model, guide))


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("posterior", POSTERIORS)
def test_every_pair_is_explained(likelihood, posterior):
    model, guide = pair(likelihood, posterior)
    x = data(likelihood)
    terms = rows(pv.explain(model, guide, TraceMeanField_ELBO(), x))
    assert terms["z"].estimate == (
        "closed form" if has_kl(guide.encoder(x), model.prior()) else "Monte Carlo"
    )
    assert terms["x"].estimate == "Monte Carlo"


class Program(PyroModule):
    def __init__(self, run):
        super().__init__()
        self.run = run
        self.w = nn.Parameter(torch.tensor(0.3))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            self.run(self.w, x)


def normal(name, loc):
    return pyro.sample(name, dist.Normal(loc, 1.0))


def observe(loc, x, name="x"):
    pyro.sample(name, dist.Normal(loc, 1.0), obs=x)


PRIORS = {
    "a flow as a guide": (
        lambda w: dist.Normal(w, 1.0),
        lambda w: dist.TransformedDistribution(
            dist.Normal(w, 1.0), [dist.transforms.AffineTransform(0.0, 1.0)]
        ),
        r"no KL\(TransformedDistribution \|\| Normal\) is registered",
    ),
    "a mixture prior": (
        lambda w: dist.MixtureSameFamily(
            dist.Categorical(torch.ones(2)), dist.Normal(torch.stack([w, -w]), 1.0)
        ),
        lambda w: dist.Normal(w, 1.0),
        r"no KL\(Normal \|\| MixtureSameFamily\) is registered",
    ),
    "a Student's prior": (
        lambda w: dist.StudentT(3.0, w, 1.0),
        lambda w: dist.Normal(w, 1.0),
        r"no KL\(Normal \|\| StudentT\) is registered",
    ),
    "two Gaussians": (
        lambda w: dist.Normal(w, 1.0),
        lambda w: dist.Normal(w, 2.0),
        r"KL\(Normal \|\| Normal\) is registered",
    ),
}


@pytest.mark.parametrize("name", PRIORS)
def test_it_says_where_a_mean_field_elbo_falls_back_to_monte_carlo(name):
    p, q, why = PRIORS[name]
    model = Program(lambda w, x: observe(pyro.sample("z", p(w)), x))
    guide = Program(lambda w, x: pyro.sample("z", q(w)))
    (z, _) = pv.explain(model, guide, TraceMeanField_ELBO(), torch.randn(4)).terms
    assert z.estimate == ("Monte Carlo" if why.startswith("no") else "closed form")
    assert re.fullmatch(why, z.why)


def test_a_bottom_up_guide_is_told_why_no_closed_form_would_be_right():
    model = Program(lambda w, x: observe(normal("z1", w * normal("z2", 0 * x)), x))
    guide = Program(lambda w, x: normal("z2", w * normal("z1", w + x)))
    terms = rows(pv.explain(model, guide, Trace_ELBO(), torch.randn(4)))
    assert "would be wrong: 'z1' depends on 'z2' in the model" in terms["z1"].why
    assert terms["z2"].why == "KL(Normal || Normal) is registered, but Trace_ELBO uses no closed form"
    with pytest.raises(
        ValueError,
        match="'z1': expected its parents in the model not to depend.*TraceMeanField_ELBO.*which is wrong",
    ):
        pv.explain(model, guide, TraceMeanField_ELBO(), torch.randn(4))


class Subsampled(PyroModule):
    def __init__(self, site):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.3))
        self.site = site

    def forward(self, x):
        with pyro.plate("data", 1000, subsample_size=len(x)), pyro.poutine.mask(mask=x > 0):
            z = normal("z", self.w + 0 * x if self.site == "z" else 0 * x)
            if self.site == "x":
                observe(z, x)


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
def test_a_subsampled_plate_and_a_mask(elbo):
    x = torch.tensor([-1.0, 0.5, 1.0, 2.0, -2.0])
    model, guide = Subsampled("x"), Subsampled("z")
    explanation = pv.explain(model, guide, elbo(), x)
    terms = rows(explanation)
    assert terms["z"].plates == "data 5 of 1000"
    assert terms["z"].scale == "200"
    assert terms["z"].mask == "3 of 5"
    for term, sign in ((terms["z"], -1), (terms["x"], 1)):
        assert term.share == pytest.approx(sign * 200 * term.nats, rel=1e-4)
    if elbo is TraceMeanField_ELBO:
        assert terms["z"].nats == pytest.approx(3 * 0.5 * 0.3**2)  # of the three that count
    assert explanation.elbo == pytest.approx(terms["x"].share + terms["z"].share)


def test_a_weight_for_every_data_point():
    x, weights = torch.randn(4), torch.tensor([1.0, 2.0, 0.5, 1.0])
    model = Program(lambda w, x: observe(normal("z", 0 * x), x))
    guide = Program(lambda w, x: normal("z", w + x))
    programs = [pyro.poutine.scale(program, scale=weights) for program in (model, guide)]
    z = pv.explain(*programs, TraceMeanField_ELBO(), x).terms[0]
    kl = 0.5 * (0.3 + x) ** 2
    assert z.scale == "0.5 to 2"
    assert z.nats == pytest.approx(kl.sum().item(), rel=1e-5)
    assert z.share == pytest.approx(-(weights * kl).sum().item(), rel=1e-5)


def test_an_objective_that_is_not_a_sum_over_sites_is_noted():
    model, guide = pair()
    elbo = RenyiELBO(0, num_particles=5, vectorize_particles=True, max_plate_nesting=1)
    explanation = pv.explain(model, guide, elbo, data())
    assert explanation.note == "RenyiELBO is not a sum over sites: the terms are those of Trace_ELBO."
    plain = pv.explain(model, guide, Trace_ELBO(num_particles=5), data())
    assert explanation.terms[0].nats is not None
    assert str(explanation).endswith(explanation.note)
    assert plain.note == ""


@pytest.mark.parametrize("autoguide", [AutoNormal, AutoMultivariateNormal, AutoDelta])
def test_autoguides(autoguide):
    def model(x):
        s = pyro.sample("s", dist.LogNormal(0.3, 0.7))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, s), obs=x)
            pyro.sample("y", dist.Normal(0.0, s), obs=x)

    if autoguide is AutoMultivariateNormal:
        inner = model

        def model(x):
            pyro.sample("t", dist.Normal(0.0, 1.0))
            inner(x)

    guide = autoguide(model)
    explanation = pv.explain(model, guide, Trace_ELBO(), torch.randn(4))
    terms = rows(explanation)
    assert terms["s"].model == "LogNormal"
    assert terms["s"].guide == "Delta"
    assert "point" in terms["s"].why
    assert any(term.role == "auxiliary" for term in explanation.terms) == (autoguide is not AutoDelta)
    assert sum(term.share for term in explanation.terms) == pytest.approx(explanation.elbo, rel=1e-5)


def mixture(w, x):
    k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7])))
    loc = torch.tensor([-1.0, 1.0])[k] + w
    observe(loc, x)
    observe(loc + 1, x, "y")


def test_a_site_summed_out_of_the_model():
    """One term for all that share the sum, the exact log evidence."""
    model = Program(config_enumerate(mixture))
    x = torch.randn(5)
    explanation = pv.explain(model, lambda x: None, TraceEnum_ELBO(max_plate_nesting=1), x)
    terms = rows(explanation)
    loc = torch.tensor([-1.0, 1.0])[:, None] + 0.3
    joint = dist.Normal(loc, 1.0).log_prob(x) + dist.Normal(loc + 1, 1.0).log_prob(x)
    exact = (torch.tensor([0.3, 0.7]).log()[:, None] + joint).logsumexp(0).sum()
    assert explanation.elbo == pytest.approx(exact.item(), rel=1e-5)
    assert terms["x"].share == pytest.approx(exact.item(), rel=1e-5)
    assert terms["x"].why == "the logarithm of a sum over k, with y"
    assert [terms[name].share for name in "ky"] == [None, None]
    assert {terms[name].estimate for name in "xyk"} == {"exact sum"}


def test_a_site_enumerated_in_the_guide():
    """E_q over all values: the exact KL and the exact expectations."""
    probs = torch.tensor([0.3, 0.7])
    guide = Program(
        config_enumerate(lambda w, x: pyro.sample("k", dist.Categorical(logits=torch.stack([w, -w]))))
    )
    x = torch.randn(5)
    explanation = pv.explain(Program(mixture), guide, TraceEnum_ELBO(max_plate_nesting=1), x)
    terms = rows(explanation)
    q = torch.tensor([0.3, -0.3]).softmax(0)
    loc = torch.tensor([-1.0, 1.0])[:, None] + 0.3
    assert terms["k"].nats == pytest.approx(5 * (q * (q / probs).log()).sum().item(), rel=1e-4)
    assert terms["x"].nats == pytest.approx((q @ dist.Normal(loc, 1.0).log_prob(x)).sum().item(), rel=1e-4)
    assert terms["k"].draw == "enumerated"
    assert sum(term.share for term in explanation.terms) == pytest.approx(explanation.elbo, rel=1e-5)


def test_a_score_function_is_named():
    guide = Program(lambda w, x: pyro.sample("k", dist.Categorical(logits=torch.stack([w, -w]))))
    terms = rows(pv.explain(Program(mixture), guide, TraceGraph_ELBO(), torch.randn(5)))
    assert terms["k"].draw == "score function"


def test_a_bad_batch_is_refused():
    with pytest.raises(ValueError, match=r"'x'.*expected 0 or 1, got .*24 of 24 values.* 0\.5\..*binarise"):
        pv.explain(*pair(), Trace_ELBO(), torch.full((4, 6), 0.5))


def test_free_nats_are_in_the_elbo_and_not_in_the_kl():
    model, guide = references.linear_gaussian()
    x = torch.randn(8, 5, dtype=torch.float64)
    z, _ = pv.explain(model, guide, pv.FreeBits(30.0), x).terms
    assert z.nats == pytest.approx(references.kl(guide, x).sum().item())
    assert z.share == pytest.approx(-30.0 * 8)
