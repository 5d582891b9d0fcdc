"""The table of what each ELBO can do says the truth, where a tiny pair can show it."""

import inspect

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import infer, poutine
from pyro.contrib.cevae import TraceCausalEffect_ELBO
from pyro.contrib.gp.kernels import RBF
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.nn import PyroModule
from registry import data, pair
from torch import nn
from torch.distributions import kl_divergence

import pyro_vae as pv
from pyro_vae.elbos.capabilities import AnalyticKL, Capabilities, capabilities, inner_elbo
from pyro_vae.evaluation import references

# Every ELBO, with two particles where it needs more than one to be itself.
ELBOS = {
    "Trace_ELBO": lambda: infer.Trace_ELBO(max_plate_nesting=1),
    "TraceGraph_ELBO": lambda: infer.TraceGraph_ELBO(max_plate_nesting=1),
    "TraceMeanField_ELBO": lambda: infer.TraceMeanField_ELBO(max_plate_nesting=1),
    "TraceEnum_ELBO": lambda: infer.TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False),
    "TraceTMC_ELBO": lambda: infer.TraceTMC_ELBO(max_plate_nesting=1, strict_enumeration_warning=False),
    "RenyiELBO": lambda: infer.RenyiELBO(
        num_particles=2, max_plate_nesting=1, vectorize_particles=True, strict_enumeration_warning=False
    ),
    "Trace_MMD": lambda: infer.Trace_MMD(RBF(1), num_particles=2, max_plate_nesting=1),
    "IWAE": lambda: pv.IWAE(2),
    "Renyi": lambda: pv.Renyi(0.5, 2),
    "STL": pv.STL,
    "DReG": lambda: pv.DReG(2),
    "MeanField": pv.MeanField,
    "FreeBits": lambda: pv.FreeBits(0.0),
}
# name -> (how it is made, why it is refused)
REFUSED = {
    "JitTrace_ELBO": (infer.JitTrace_ELBO, "twice too large.*without Jit"),
    "JitTraceGraph_ELBO": (infer.JitTraceGraph_ELBO, "twice too large.*without Jit"),
    "JitTraceEnum_ELBO": (infer.JitTraceEnum_ELBO, "twice too large.*without Jit"),
    "JitTraceMeanField_ELBO": (infer.JitTraceMeanField_ELBO, "twice too large.*without Jit"),
    "ReweightedWakeSleep": (infer.ReweightedWakeSleep, "not one number.*Trace_ELBO"),
    "TraceTailAdaptive_ELBO": (infer.TraceTailAdaptive_ELBO, "not one number.*Trace_ELBO"),
}
every_elbo = pytest.mark.parametrize("name", ELBOS)
# Trace_MMD has a penalty of its own in place of the KL.
every_bound = pytest.mark.parametrize("name", [name for name in ELBOS if name != "Trace_MMD"])
NEED_RSAMPLE = {"TraceMeanField_ELBO", "RenyiELBO", "TraceTMC_ELBO", "Trace_MMD", "STL", "DReG"}

X = torch.tensor([-1.2, 0.3, 2.0])


class Program(PyroModule):
    """A model or guide of one function, inside the plate of the data."""

    def __init__(self, run):
        super().__init__()
        self.run = run
        self.w = nn.Parameter(torch.tensor(0.3))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            self.run(self.w, x)


def normal(name, loc, sigma=1.0):
    return pyro.sample(name, dist.Normal(loc, sigma))


def svi(model, guide, elbo):
    return pv.SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), loss=elbo)


def losses(elbo, model, guide, x, draws=5):
    """Losses of several draws, which are all the same where the ELBO draws nothing."""
    found = []
    for seed in range(draws):
        torch.manual_seed(seed)
        found.append(float(elbo.loss(model, guide, x)))
    return torch.tensor(found)


def test_every_elbo_is_in_this_file():
    in_pyro = {name for name, kind in vars(infer).items() if inspect.isclass(kind) and issubclass(kind, ELBO)}
    kinds = {name: getattr(pv, name) for name in pv.__all__}
    ours = {name for name, kind in kinds.items() if inspect.isclass(kind) and issubclass(kind, ELBO)}
    assert in_pyro | ours == {*ELBOS, *REFUSED, "ELBO", "CompiledELBO"}


# What SVI refuses.


@pytest.mark.parametrize("name", REFUSED)
def test_an_elbo_that_would_be_wrong_is_refused_with_its_reason(name):
    make, why = REFUSED[name]
    assert capabilities(make()).refusal
    with pytest.raises(ValueError, match=f"loss: expected a Pyro ELBO .*, got {name}: .*{why}"):
        svi(*pair(), make())


@every_elbo
def test_any_other_elbo_trains(name):
    elbo = ELBOS[name]()
    assert not capabilities(elbo).refusal
    model, guide = pair()
    before = [p.detach().clone() for p in pv.parameters(model, guide)]
    svi(model, guide, elbo).step(data())
    assert not any(map(torch.equal, before, pv.parameters(model, guide)))


# A site that the model enumerates and the guide lacks.


def mixture(**infer):
    """k of two values, and x ~ N(2 k + w, 1)."""

    def run(w, x):
        k = pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel", **infer})
        pyro.sample("x", dist.Normal(2 * k + w, 1.0), obs=x)

    return Program(run)


def log_p_of_mixture(w):
    """log p(x) = sum_n log(0.7 N(x_n; w, 1) + 0.3 N(x_n; 2 + w, 1))"""
    each = torch.stack(
        [dist.Normal(2 * k + w, 1.0).log_prob(X) + torch.tensor(p).log() for k, p in ((0, 0.7), (1, 0.3))]
    )
    return each.logsumexp(0).sum()


def no_sites(x):
    pass


@every_elbo
def test_it_sums_out_what_the_table_says(name):
    model, elbo = mixture(), ELBOS[name]()
    if capabilities(elbo).sums_out:
        exact = -log_p_of_mixture(model.w)
        torch.testing.assert_close(losses(elbo, model, no_sites, X), exact.detach().expand(5))
        (gradient,) = torch.autograd.grad(exact, [model.w])
        elbo.loss_and_grads(model, no_sites, X)
        torch.testing.assert_close(model.w.grad, gradient)
        svi(model, no_sites, elbo).step(X)
    else:
        with pytest.raises(
            ValueError,
            match=rf"\['k'\] of the model: expected them in the guide, since {type(elbo).__name__} ",
        ):
            svi(model, no_sites, elbo).step(X)


@pytest.mark.parametrize("name", ["Trace_ELBO", "TraceGraph_ELBO", "RenyiELBO"])
def test_what_does_not_sum_out_would_draw_from_the_prior(name):
    with pyro.validation_enabled(False):
        assert losses(ELBOS[name](), mixture(), no_sites, X, draws=20).std() > 0.1


# A site that model and guide both observe.


@every_elbo
def test_it_refuses_a_site_that_the_guide_observes_too(name):
    elbo = ELBOS[name]()
    model = Program(lambda w, x: pyro.sample("x", dist.Normal(normal("z", torch.zeros(3)) + w, 1.0), obs=x))

    def draw(w, x):
        pyro.sample("x", dist.Normal(w, 1.0), obs=x)
        normal("z", w)

    assert not capabilities(elbo).observes_guide
    with pytest.raises(
        ValueError, match=f"The guide: .*got one that observes 'x', as the model does, and {name} .*log q"
    ):
        svi(model, Program(draw), elbo).step(X)


# An enumerated site of the guide.


@pytest.mark.parametrize("name", [name for name in ELBOS if name not in NEED_RSAMPLE])
def test_it_sums_over_the_guide_what_the_table_says(name):
    elbo = ELBOS[name]()
    able = capabilities(elbo)
    model = Program(
        lambda w, x: pyro.sample("x", dist.Normal(2 * pyro.sample("k", dist.Bernoulli(0.3)) + w, 1.0), obs=x)
    )
    marked = {"enumerate": "parallel"}
    guide = Program(lambda w, x: pyro.sample("k", dist.Bernoulli(torch.full((3,), 0.4)), infer=marked))
    with pyro.validation_enabled(False):
        found = losses(elbo, model, guide, X, draws=20)
    if able.enumerates_guide:
        assert found.std() < 1e-5
        if name == "TraceEnum_ELBO":
            q, p = dist.Bernoulli(torch.tensor(0.4)), dist.Bernoulli(torch.tensor(0.3))
            each = torch.stack([dist.Normal(2.0 * k + model.w, 1.0).log_prob(X) for k in (0, 1)])
            exact = (torch.tensor([[0.6], [0.4]]) * each).sum() - 3 * kl_divergence(q, p)
            torch.testing.assert_close(found, -exact.detach().expand(20))
    else:
        assert found.std() > 0.1


# A draw that is not reparameterised.


@every_elbo
def test_it_refuses_a_categorical_guide_where_it_needs_rsample(name):
    elbo = ELBOS[name]()

    def joint(w, x):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.7, 0.3])))
        pyro.sample("x", dist.Normal(2.0 * k + w, 1.0), obs=x)

    guide = Program(lambda w, x: pyro.sample("k", dist.Categorical(logits=torch.stack([w, -w]).expand(3, 2))))
    model = Program(joint)
    assert capabilities(elbo).needs_rsample == (name in NEED_RSAMPLE)
    if name in NEED_RSAMPLE:
        with pytest.raises(
            ValueError, match=f"'k' of the guide, Categorical.*rsample.*{name}.*not reparameterised"
        ):
            svi(model, guide, elbo).step(X)
    else:
        before = guide.w.detach().clone()
        svi(model, guide, elbo).step(X)
        assert guide.w != before


# An analytic KL.


def independent():
    """A latent that x does not depend on, and a guide that is another Gaussian: KL(q || p) + log p(x)."""

    def run(w, x):
        normal("z", torch.zeros(3))
        pyro.sample("x", dist.Normal(w, 1.0), obs=x)

    return Program(run), Program(lambda w, x: normal("z", w + 0.5 * x, 0.6))


@every_bound
def test_its_kl_has_no_noise_where_the_table_says_that_it_is_analytic(name):
    elbo, (model, guide) = ELBOS[name](), independent()
    found = losses(elbo, model, guide, X, draws=20)
    if capabilities(elbo).analytic_kl is AnalyticKL.NEVER:
        assert found.std() > 0.1
    else:
        # KL(N(m, s^2) || N(0, 1)) = (s^2 + m^2 - 1) / 2 - log s
        m, s = guide.w + 0.5 * X, torch.tensor(0.6)
        kl = ((s**2 + m**2 - 1) / 2 - s.log()).sum()
        exact = kl - dist.Normal(model.w, 1.0).log_prob(X).sum()
        torch.testing.assert_close(found, exact.detach().expand(20))


@every_elbo
def test_only_an_elbo_that_is_always_analytic_refuses_a_bottom_up_guide(name):
    elbo = ELBOS[name]()

    def joint(w, x):
        z2 = normal("z2", torch.zeros(3))
        z1 = normal("z1", w * z2)
        pyro.sample("x", dist.Normal(z1, 1.0), obs=x)

    bottom_up = Program(lambda w, x: normal("z2", w * normal("z1", 0.5 * x)))
    run = svi(Program(joint), bottom_up, elbo)
    if capabilities(elbo).analytic_kl is AnalyticKL.ALWAYS:
        with pytest.raises(ValueError, match=f"'z1': expected its parents .*since {name} .*wrong here"):
            run.step(X)
    else:
        run.step(X)


# The scale of a subsampled plate.


@every_bound
def test_a_subsampled_plate_multiplies_the_loss_where_the_table_says_so(name):
    elbo = ELBOS[name]()
    # With one draw of each site there is no sum inside the logarithm of TraceTMC_ELBO.
    infer = {"enumerate": "parallel", "num_samples": 2} if name == "TraceTMC_ELBO" else {}
    model, guide = references.linear_gaussian(width=3, dim=1)
    x = torch.randn(4, 3, dtype=torch.float64)

    class Sized(PyroModule):
        def __init__(self, net, size):
            super().__init__()
            self.net, self.size = net, size

        def forward(self, x):
            with pyro.plate("data", self.size, subsample=torch.arange(len(x))):
                return self.net(x)

    def programs(size):
        return (
            Sized(lambda x: pyro.sample("x", model.decoder(pyro.sample("z", model.prior())), obs=x), size),
            Sized(lambda x: pyro.sample("z", guide.encoder(x), infer=infer), size),
        )

    with pyro.validation_enabled(False):
        whole, part = (losses(elbo, *programs(size), x) for size in (4, 10))
    if capabilities(elbo).accepts_scales:
        torch.testing.assert_close(part, 2.5 * whole)
    else:
        assert ((part - 2.5 * whole).abs() > 1e-3 * whole.abs()).all()
        scaled = [poutine.scale(program, scale=2.5) for program in independent()]
        with pytest.raises(ValueError, match=f"'z': expected no scale, got 2.5. {name} .*no bound"):
            svi(*scaled, elbo).step(X)


# Classes of the user's.


def test_a_subclass_inherits_the_entry_of_its_nearest_base():
    for kind in (
        TraceMeanField_ELBO,
        TraceEnum_ELBO,
        TraceCausalEffect_ELBO,
        infer.TraceTMC_ELBO,
        infer.JitTrace_ELBO,
        Trace_ELBO,
        pv.MeanField,
    ):
        child = type("Child", (type("Own", (kind,), {}),), {})
        assert capabilities(child()) == capabilities(kind())
    assert capabilities(type("Child", (pv.IWAE,), {})(3)) == capabilities(pv.IWAE(3))
    with pytest.raises(ValueError, match="got Child: .*without Jit"):
        svi(*pair(), type("Child", (infer.JitTrace_ELBO,), {})())


class OfMyOwn(ELBO):
    """An objective that returns what it is given, of the loss for each data point."""

    def __init__(self, result):
        super().__init__()
        self.result = result

    def _get_trace(self, model, guide, args, kwargs):
        q = poutine.trace(guide).get_trace(*args, **kwargs)
        return poutine.trace(poutine.replay(model, q)).get_trace(*args, **kwargs), q

    def differentiable_loss(self, model, guide, *args, **kwargs):
        p, q = self._get_trace(model, guide, args, kwargs)
        p.compute_log_prob()
        q.compute_log_prob()
        return self.result(q.nodes["z"]["log_prob"] - p.nodes["z"]["log_prob"] - p.nodes["x"]["log_prob"])


class WithLoss(OfMyOwn):
    def loss(self, model, guide, *args, **kwargs):
        with torch.no_grad():
            return float(self.differentiable_loss(model, guide, *args, **kwargs))


@pytest.mark.parametrize(
    ("elbo", "message"),
    [
        (WithLoss(lambda each: each), r"WithLoss .*expected one loss, .*got shape \(8,\).*end in .sum"),
        (WithLoss(lambda each: each.sum().item()), "differentiable_loss to return a tensor, got float"),
        (OfMyOwn(lambda each: each.sum()), "loss: expected OfMyOwn to have a method loss.*got none"),
    ],
    ids=["one for each", "a float", "no loss"],
)
def test_an_objective_of_ones_own_is_checked(elbo, message):
    model, guide = pair()
    svi = pv.SVI(model, guide, torch.optim.Adam(pv.parameters(model, guide)), loss=elbo)
    with pytest.raises(ValueError, match=message):
        svi.step(data(size=8))


class Marginal(ELBO):
    """A user's own ELBO, which leaves its work to TraceEnum_ELBO."""

    def loss(self, model, guide, *args, **kwargs):
        return TraceEnum_ELBO(max_plate_nesting=1).loss(model, guide, *args, **kwargs)

    def differentiable_loss(self, model, guide, *args, **kwargs):
        return TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(model, guide, *args, **kwargs)

    def _get_trace(self, model, guide, args, kwargs):
        raise NotImplementedError


def test_the_declaration_of_a_user_s_elbo_is_read():
    model = mixture()
    assert capabilities(Marginal()) == Capabilities()
    with pytest.raises(ValueError, match=r"\['k'\] of the model: .* since Marginal does not sum them out"):
        svi(model, no_sites, Marginal()).step(X)
    declared = type("Declared", (Marginal,), {"capabilities": Capabilities(sums_out=True)})
    loss = svi(model, no_sites, declared()).step(X)
    assert loss == pytest.approx(float(-log_p_of_mixture(torch.tensor(0.3))))
    # Its own declaration comes before that of a base.
    again = type("Again", (declared,), {"capabilities": Capabilities(refusal="it is mine. To fix: ask me.")})
    with pytest.raises(ValueError, match="got Again: it is mine. To fix: ask me."):
        svi(model, no_sites, again())


def test_a_compiled_elbo_can_do_what_its_elbo_can():
    model = mixture()
    compiled = pv.CompiledELBO(ELBOS["TraceEnum_ELBO"](), backend="eager")
    assert capabilities(inner_elbo(compiled)).sums_out
    assert svi(model, no_sites, compiled).step(X) == pytest.approx(
        float(-log_p_of_mixture(torch.tensor(0.3)))
    )
    with pytest.raises(ValueError, match=r"\['k'\] of the model: .* since Trace_ELBO does not"):
        svi(model, no_sites, pv.CompiledELBO(Trace_ELBO(), backend="eager")).step(X)
