import math
import re
from contextlib import contextmanager
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.nn import PyroModule
from registry import data, each_once, pair

import pyro_vae as pv
from pyro_vae.evaluation import references

BETAS = [0, 0.5, 3.0, torch.tensor(0.25, dtype=torch.float64)]


@pytest.fixture
def case():
    model, guide = references.linear_gaussian()
    return model, guide, torch.randn(4, 5, dtype=torch.float64)


def loss(elbo, model, guide, x):
    """The loss and its gradients, always with the same noise."""
    torch.manual_seed(1)
    value = elbo.differentiable_loss(model, guide, x)
    return torch.cat([value.reshape(1), *(g.flatten() for g in gradients(value, model, guide))]).detach()


def gradients(value, model, guide):
    trained = pv.parameters(model, guide)
    found = torch.autograd.grad(value, trained, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(trained, found, strict=True)]


def weighted(model, guide, x, beta):
    """The same noise's reconstruction, and the closed-form KL, apart: value and gradients."""
    torch.manual_seed(1)
    value = beta * references.kl(guide, x).sum()
    value = value - model.decoder(guide.encoder(x).rsample()).log_prob(x).sum()
    return torch.cat([value.reshape(1), *(g.flatten() for g in gradients(value, model, guide))]).detach()


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("beta", BETAS)
def test_the_weighted_loss_is_the_closed_form(case, beta, validate):
    model, guide, x = case
    with pyro.validation_enabled(validate):
        for elbo in (TraceMeanField_ELBO(), pv.MeanField()):
            with pv.scale_latents(beta):
                torch.testing.assert_close(loss(elbo, model, guide, x), weighted(model, guide, x, beta))
        # At the draw: linear in beta, between the reconstruction alone and the ELBO.
        enum = TraceEnum_ELBO(strict_enumeration_warning=False, max_plate_nesting=1)
        for elbo in (Trace_ELBO(), enum, pv.STL(), pv.IWAE(1), pv.DReG(1)):
            with pv.scale_latents(beta):
                found = loss(elbo, model, guide, x)
            none, whole = weighted(model, guide, x, 0), loss(elbo, model, guide, x)
            torch.testing.assert_close(found, none + beta * (whole - none))


@pytest.mark.parametrize("beta", BETAS)
def test_a_discrete_latent_in_the_guide_is_weighted(beta):
    """Enumerated, so exact: -E_q[log p(x | y)] + beta KL(q || p)."""
    model = references.Mixture()
    x = torch.randn(4, 2, dtype=torch.float64)
    logits = torch.randn(4, 3, dtype=torch.float64)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})

    q, p = (
        torch.distributions.Categorical(logits=logits),
        torch.distributions.Categorical(logits=model.logits),
    )
    kl = torch.distributions.kl_divergence(q, p)
    reconstruction = references.mixture_elbo(model, q, x) + kl
    with pv.scale_latents(beta):
        found = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(model, guide, x)
    torch.testing.assert_close(found, (beta * kl - reconstruction).sum())


class MixturePriorModel(PyroModule):
    """y ~ p(y); z ~ p(z | y); x ~ p(x | z): y can be summed out of the prior."""

    def forward(self, x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(torch.tensor([0.3, 0.7])), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(torch.tensor([-1.0, 2.0])[y], 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def test_a_discrete_latent_summed_out_of_the_prior_is_weighted_with_it():
    x = torch.randn(3)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 0.3))

    def found(beta):
        torch.manual_seed(0)
        with pv.scale_latents(beta):
            return TraceEnum_ELBO(max_plate_nesting=1).loss(MixturePriorModel(), guide, x)

    torch.manual_seed(0)
    z = dist.Normal(x, torch.tensor(0.3)).sample()
    prior = torch.stack([dist.Normal(m, 1.0).log_prob(z) + math.log(p) for m, p in ((-1.0, 0.3), (2.0, 0.7))])
    kl = dist.Normal(x, 0.3).log_prob(z) - prior.logsumexp(0)
    for beta in (0, 0.5, 1.0):
        assert found(beta) == pytest.approx(
            float((beta * kl - dist.Normal(z, 0.5).log_prob(x)).sum()), rel=1e-5
        )


def test_one_summed_out_of_the_likelihood_is_refused():
    def guide(x):
        pass

    with pv.scale_latents(0.5), pytest.raises(ValueError, match="share a common poutine.scale"):
        TraceEnum_ELBO(max_plate_nesting=1).loss(references.Mixture(), guide, torch.zeros(2, 2).double())


def test_latent_sites_alone_are_scaled_and_plates_go_on_scaling():
    def program():
        with pyro.plate("data", 10, subsample_size=5):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.deterministic("twice", 2 * z)
            pyro.factor("factor", z)
            pyro.sample("given", dist.Normal(z, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(5))

    held = poutine.condition(program, data={"given": torch.zeros(5)})
    trace = poutine.trace(pv.scale_latents(0.25)(held)).get_trace()
    scales = {name: site["scale"] for name, site in trace.nodes.items() if site["type"] == "sample"}
    assert scales == {"data": 1, "z": 0.5, "twice": 2, "factor": 2, "given": 2, "x": 2}
    with pytest.raises(
        ValueError, match="'given': expected it to stay latent.*observes it.*put scale_latents outermost"
    ):
        poutine.condition(pv.scale_latents(0.25)(program), data={"given": torch.zeros(5)})()


def test_it_wraps_programs_nests_and_leaves_the_loss_at_one(case):
    model, guide, x = case
    elbo = Trace_ELBO()
    half = pv.scale_latents(0.5)
    with pv.scale_latents(0.25), pv.scale_latents(2):
        expected = loss(elbo, model, guide, x)
    assert pv.parameters(half(model), half(guide)) == pv.parameters(model, guide)
    torch.testing.assert_close(loss(elbo, half(model), half(guide), x), expected)
    plain = loss(elbo, model, guide, x)
    with pv.scale_latents(1):
        torch.testing.assert_close(loss(elbo, model, guide, x), plain, rtol=0, atol=0)


@pytest.mark.parametrize(
    "beta", [-0.1, math.nan, math.inf, True, "0.5", None, torch.ones(2), torch.tensor(-1.0)]
)
def test_other_weights_are_refused(beta):
    given = "(a tensor of shape|-1.0)" if torch.is_tensor(beta) else re.escape(repr(beta))
    with pytest.raises(ValueError, match=f"scale_latents: expected a finite number.*got {given}"):
        pv.scale_latents(beta)


# A weight that is no longer one when it is used.


def inside(program, handler):
    """A program that enters the handler by itself."""

    class Weighted(PyroModule):
        def __init__(self):
            super().__init__()
            self.program = program

        def forward(self, x):
            with handler:
                return self.program(x)

    return Weighted()


@contextmanager
def as_a_context(handler, svi_of, model, guide):
    with handler:
        yield svi_of(model, guide)


@contextmanager
def as_a_wrapper(handler, svi_of, model, guide):
    yield svi_of(handler(model), handler(guide))


@contextmanager
def as_a_wrapper_among_others(handler, svi_of, model, guide):
    yield svi_of(*(partial(poutine.scale(handler(program), scale=2.0)) for program in (model, guide)))


@pytest.mark.parametrize(
    ("where", "compiled", "wrong", "tensor"),
    each_once(
        [as_a_context, as_a_wrapper, as_a_wrapper_among_others],
        [False, True],
        [-1.0, math.nan, math.inf],
        [False, True],
    ),
)
def test_a_weight_that_becomes_wrong_is_refused_by_the_next_step(where, compiled, wrong, tensor):
    model, guide = pair()
    x, trained = data(), pv.parameters(model, guide)
    handler = pv.scale_latents(torch.tensor(0.5) if tensor else 0.5)

    def svi_of(*programs):
        elbo = pv.CompiledELBO(pv.MeanField(), backend="eager") if compiled else pv.MeanField()
        return pv.SVI(*programs, torch.optim.SGD(trained, lr=1e-3), elbo)

    with where(handler, svi_of, model, guide) as svi:
        svi.step(x)
        before = [p.detach().clone() for p in trained]
        if tensor:
            handler.beta.fill_(wrong)
        else:
            handler.beta = wrong
        for run in (svi.step, svi.evaluate_loss):
            with pytest.raises(ValueError, match="scale_latents: expected a finite number of 0 or more"):
                run(x)
        assert all(map(torch.equal, before, trained))
        if tensor:
            handler.beta.fill_(0.25)
        else:
            handler.beta = 0.25
        svi.step(x)


@pytest.mark.parametrize("loss", [Trace_ELBO(), pv.IWAE(2), pv.CompiledELBO(Trace_ELBO(), backend="eager")])
def test_a_weight_that_becomes_wrong_is_refused_by_a_loss_alone(loss):
    model, guide = pair()
    beta = torch.tensor(0.5)
    with pv.scale_latents(beta):
        loss.loss(model, guide, data())
        beta.fill_(-1.0)
        for run in (loss.loss, loss.loss_and_grads):
            with pytest.raises(ValueError, match="scale_latents: expected a finite number of 0 or more"):
                run(model, guide, data())


def test_a_number_inside_a_program_is_read_at_every_use():
    model, guide = pair()
    handlers = [pv.scale_latents(0.5) for _ in range(2)]
    programs = map(inside, (model, guide), handlers)
    svi = pv.SVI(*programs, pyro.optim.Adam({"lr": 1e-3}), loss=Trace_ELBO())
    svi.step(data())
    for handler in handlers:
        handler.beta = -0.5
    with pytest.raises(ValueError, match="scale_latents: expected a finite number .*got -0.5"):
        svi.step(data())


def test_a_wrapper_that_begins_to_weight_is_checked_again():
    model, guide = pair()
    beta = torch.tensor(1.0)
    handler = pv.scale_latents(beta)
    elbo = RenyiELBO(alpha=0, num_particles=2, vectorize_particles=True, max_plate_nesting=1)
    svi = pv.SVI(handler(model), handler(guide), pyro.optim.Adam({"lr": 1e-3}), loss=elbo)
    svi.step(data())
    beta.fill_(0.5)
    with pytest.raises(ValueError, match="inside its logarithm"):
        svi.step(data())


def test_one_side_alone_is_refused():
    model, guide = pair()
    svi = pv.SVI(pv.scale_latents(0.5)(model), guide, pyro.optim.Adam({"lr": 1e-3}), loss=Trace_ELBO())
    with pytest.raises(
        ValueError, match=r"'z': expected the same scale.*got 0\.5 in the model and 1\.0 in the guide"
    ):
        svi.step(data())


def test_what_cannot_be_weighted_is_refused_after_steps_without_a_weight():
    model, guide = pair()
    elbo = RenyiELBO(alpha=0, num_particles=2, vectorize_particles=True, max_plate_nesting=1)
    svi = pv.SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), loss=elbo)
    svi.step(data())
    with pv.scale_latents(1.0):
        svi.step(data())
    with pv.scale_latents(0.5), pytest.raises(ValueError, match="inside its logarithm"):
        svi.step(data())


def test_fit_reports_the_unweighted_elbo():
    x = data()
    found = {}
    for beta in (1.0, 0.0):
        torch.manual_seed(0)
        model, guide = pair()
        # a learning rate of 0: the same pair after the pass
        svi = pv.SVI(
            model, guide, torch.optim.SGD(pv.parameters(model, guide), lr=0.0), TraceMeanField_ELBO()
        )
        with pv.scale_latents(beta):
            (found[beta],) = pv.fit(svi, [x], 1, progress=False)
    assert found[0.0].elbo == found[1.0].elbo
    assert found[0.0].kl == found[1.0].kl > 0
    assert found[0.0].loss < found[1.0].loss


# Compiled: a weight is an input of the graph.


def test_one_graph_serves_every_weight(case):
    model, guide, x = case
    for elbo in (Trace_ELBO(), pv.IWAE(3)):
        compiled = pv.CompiledELBO(elbo, backend="eager", check=True)
        for beta in (0.5, 0.0, 2.0, torch.tensor(0.25, dtype=torch.float64)):
            with pv.scale_latents(beta):
                torch.manual_seed(1)
                found = compiled.loss(model, guide, x)
                assert found == pytest.approx(float(loss(elbo, model, guide, x)[0]), rel=1e-12)
        assert compiled.num_graphs == 1
        torch.manual_seed(1)
        assert compiled.loss(model, guide, x) == pytest.approx(
            float(loss(elbo, model, guide, x)[0]), rel=1e-12
        )
        assert compiled.num_graphs == 2  # without a weight: another graph


def test_compiled_gradients_follow_the_weight(case):
    model, guide, x = case
    compiled = pv.CompiledELBO(Trace_ELBO(), backend="eager")
    for beta in (0.5, 3.0):
        with pv.scale_latents(beta):
            torch.manual_seed(1)
            compiled.loss_and_grads(model, guide, x)
            found = torch.cat([p.grad.flatten() for p in pv.parameters(model, guide)])
            torch.testing.assert_close(found, loss(Trace_ELBO(), model, guide, x)[1:])
        for p in pv.parameters(model, guide):
            p.grad = None


def test_a_compiled_wrapper_follows_its_tensor(case):
    model, guide, x = case
    beta = torch.tensor(0.5, dtype=torch.float64)
    handler = pv.scale_latents(beta)
    weighted_pair = handler(model), handler(guide)
    compiled = pv.CompiledELBO(Trace_ELBO(), backend="eager")
    for value in (0.5, 0.0, 2.0):
        beta.fill_(value)
        torch.manual_seed(1)
        found = compiled.loss(*weighted_pair, x)
        assert found == pytest.approx(float(loss(Trace_ELBO(), *weighted_pair, x)[0]), rel=1e-12)
    assert compiled.num_graphs == 1


def test_other_handlers_around_a_compiled_step_are_part_of_its_signature(case):
    model, guide, x = case
    compiled = pv.CompiledELBO(Trace_ELBO(), backend="eager")
    for scale in (1.0, 0.5, 2.0):
        with poutine.scale(scale=scale):
            torch.manual_seed(1)
            found = compiled.loss(model, guide, x)
            assert found == pytest.approx(float(loss(Trace_ELBO(), model, guide, x)[0]), rel=1e-12)


def test_a_warm_up_trains_compiled():
    model, guide = pair()
    beta = torch.tensor(0.0)
    elbo = pv.CompiledELBO(TraceMeanField_ELBO(), backend="eager")
    svi = pv.SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), loss=elbo)
    with pv.scale_latents(beta):
        for epoch in pv.fit(svi, [data()] * 2, 3, progress=False):
            beta.fill_(min(1.0, epoch.epoch / 2))
    assert elbo.num_graphs == 1


def test_weights_do_not_reach_the_evaluation(case):
    model, guide, x = case
    results = []
    for beta in (1.0, 0.0):
        torch.manual_seed(0)
        with pv.scale_latents(beta):
            results.append((pv.log_evidence(model, guide, x, 10).values, pv.elbo_terms(model, guide, x).elbo))
    for plain, other in zip(*results, strict=True):
        torch.testing.assert_close(plain, other, rtol=0, atol=0)
