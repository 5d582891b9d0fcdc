"""A captured step has the numbers of an eager one."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from compiled_steps import ELBOS, Normed, adam, assert_same_training, compiles, losses, replayed
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam
from registry import LIKELIHOODS, POSTERIORS, data, each_once, pair
from torch import nn
from torch.distributions import constraints

import pyro_vae as pv


@pytest.mark.parametrize(
    ("likelihood", "posterior", "elbo"), each_once(LIKELIHOODS, POSTERIORS, ["trace", "mean-field"])
)
def test_fifty_steps_are_those_of_eager(likelihood, posterior, elbo):
    x = data(likelihood, 16)
    assert_same_training(pair(likelihood, posterior), ELBOS[elbo](), 50 * [x])


@pytest.mark.parametrize("elbo", ELBOS)
def test_every_elbo_is_captured(elbo):
    assert_same_training(pair(), ELBOS[elbo](), 20 * [data()])


@pytest.mark.parametrize("elbo", ["trace", "mean-field", "renyi"])
def test_under_the_svi_of_pyro(elbo):
    assert_same_training(pair(), ELBOS[elbo](), 20 * [data()], pyro.infer.SVI)


@compiles
def test_the_default_backend_has_the_numbers_of_eager():
    """On a CPU its normal noise is of torch's own stream, and its products are of full precision."""
    programs = pair(width=64, hidden=40)
    twins = copy.deepcopy(programs)
    x = data(width=64, size=64)
    eager = losses(pv.SVI(*programs, adam(), loss=Trace_ELBO()), 10 * [x])
    elbo = pv.CompiledELBO(Trace_ELBO())
    assert losses(pv.SVI(*twins, adam(), loss=elbo), 10 * [x]) == pytest.approx(eager, rel=1e-4)
    for ours, theirs in zip(programs, twins, strict=True):
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-3, atol=1e-4)


def test_the_random_stream_advances():
    svi = pv.SVI(*pair(), adam(0.0), loss=replayed(Trace_ELBO()))
    x = data()
    assert len({svi.step(x) for _ in range(5)}) == 5


def test_batch_norm_and_dropout_are_those_of_eager():
    """With the running statistics and one count for each step: assert_same_training compares state_dicts."""
    assert_same_training((pair()[0], Normed()), Trace_ELBO(), 10 * [data(size=16)])


def test_batch_norm_statistics_are_updated_even_if_its_output_is_not_used():
    """BatchNorm on features that an analytic KL does without."""

    class Features(PyroModule):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(6)
            self.rest = pair()[0]

        def forward(self, x):
            pyro.deterministic("features", self.norm(x), event_dim=2)
            return self.rest(x)

    running = {}
    for loss in (Trace_ELBO(), replayed(Trace_ELBO())):
        torch.manual_seed(0)
        pyro.clear_param_store()
        model, guide = Features(), pair()[1]
        svi = pv.SVI(model, guide, adam(), loss=loss)
        for _ in range(3):
            svi.step(data())
        running[type(loss)] = model.norm.running_mean.clone()
    plain, captured = running.values()
    assert plain.abs().max() > 0
    torch.testing.assert_close(captured, plain)


def test_an_autoguide_and_pyro_params():
    class Conjugate(PyroModule):
        def __init__(self):
            super().__init__()
            self.scale = PyroParam(torch.tensor(1.0), constraint=constraints.positive)

        def forward(self, x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            w = pyro.sample("w", dist.Gamma(2.0, 2.0))
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(z * w, self.scale), obs=x)

    x = torch.randn(20)
    for auto in (AutoNormal, AutoMultivariateNormal):
        for svi_class in (pv.SVI, pyro.infer.SVI):
            pyro.clear_param_store()
            torch.manual_seed(0)
            model = Conjugate()
            guide = auto(model)
            guide(x)  # makes the parameters, so that the twins have them
            pyro.clear_param_store()
            assert_same_training((model, guide), Trace_ELBO(), 10 * [x], svi_class)


class Enumerated(PyroModule):
    """A mixture whose components are summed out in the model, or by a guide that has them as well."""

    def __init__(self, p):
        super().__init__()
        self.p = torch.tensor(p)
        self.loc = nn.Parameter(torch.linspace(-1, 1, len(p)))

    @pyro.infer.config_enumerate
    def forward(self, x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(self.p))
            pyro.sample("x", dist.Normal(self.loc[k], 1.0), obs=x)


class Assigning(PyroModule):
    def __init__(self, p, assigning):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(p).log())
        self.assigning = assigning

    @pyro.infer.config_enumerate
    def forward(self, x):
        with pyro.plate("data", len(x)):
            if self.assigning:
                pyro.sample("k", dist.Categorical(logits=self.logits))


@compiles
@pytest.mark.parametrize(
    ("p", "assigning", "backend"),
    [
        ([0.5, 0.5], True, "eager"),
        ([0.3, 0.7, 0.0], True, "eager"),
        ([0.3, 0.7, 0.0], False, "eager"),
        ([0.3, 0.7, 0.0], True, "inductor"),
    ],
)
def test_an_enumerated_latent(p, assigning, backend):
    x = torch.cat([torch.randn(10) - 3, torch.randn(10) + 3])
    model, guide = Enumerated(p), Assigning(p, assigning)
    found = []
    for elbo in (
        TraceEnum_ELBO(max_plate_nesting=1),
        pv.CompiledELBO(TraceEnum_ELBO(max_plate_nesting=1), backend=backend),
    ):
        model.zero_grad()
        guide.zero_grad()
        with pyro.validation_enabled(False):
            loss = elbo.loss_and_grads(model, guide, x)
        found.append((loss, model.loc.grad, guide.logits.grad))
    assert math.isfinite(found[0][0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5, equal_nan=True)


def test_a_score_function_site_and_a_subsampled_plate():
    class Counts(PyroModule):
        def forward(self, x):
            with pyro.plate("data", 100, subsample_size=len(x)):
                k = pyro.sample("k", dist.Bernoulli(0.5))
                pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    class Coin(PyroModule):
        def __init__(self):
            super().__init__()
            self.slope = nn.Parameter(torch.tensor(0.1))

        def forward(self, x):
            with pyro.plate("data", 100, subsample_size=len(x)):
                pyro.sample("k", dist.Bernoulli(logits=self.slope * x))

    assert_same_training((Counts(), Coin()), Trace_ELBO(), 10 * [torch.randn(7)])


def test_a_pair_with_nothing_to_train_has_a_loss():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", pv.StandardNormal(6)())
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0).to_event(1))

    x, found = data(), []
    for elbo in (replayed(Trace_ELBO()), Trace_ELBO()):
        torch.manual_seed(0)
        found.append(elbo.loss_and_grads(model, guide, x))
    assert found[0] == pytest.approx(found[1])


def test_what_is_nan_in_both_is_repeated():
    model, guide = pair()
    with torch.no_grad():
        model.decoder[0][0].weight.fill_(math.nan)
    assert math.isnan(replayed(Trace_ELBO()).loss(model, guide, data()))


def test_a_weight_beside_a_batch_of_16_bits_keeps_its_precision():
    class Widened(PyroModule):
        def __init__(self, program):
            super().__init__()
            self.program = program

        def forward(self, x):
            return self.program(x.float())

    model, guide = map(Widened, pair())
    x = data().bfloat16()
    elbo = replayed(Trace_ELBO())
    for beta in (0.5, 100.3):  # the second is 100.5 in bfloat16
        losses = []
        for each in (elbo, Trace_ELBO()):
            torch.manual_seed(0)
            with pv.scale_latents(beta):
                losses.append(each.loss(model, guide, x))
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


class Shifted(PyroModule):
    """A model that closes over a tensor."""

    def __init__(self, shift):
        super().__init__()
        self.net, self.family, self.shift = nn.Linear(2, 6), pv.Gaussian(0.3), shift

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", pv.StandardNormal(2)())
            pyro.sample("x", self.family(self.net(z) + self.shift), obs=x)


@compiles
def test_what_is_lazily_negated_is_negated():
    x = torch._neg_view(torch.rand(8, 6))
    model, guide = Shifted(torch.complex(torch.zeros(8, 6), torch.ones(8, 6)).conj().imag), pair()[1]
    assert x.is_neg()
    assert model.shift.is_neg()
    found = []
    for elbo in (Trace_ELBO(), pv.CompiledELBO(Trace_ELBO())):
        torch.manual_seed(0)
        found.append(elbo.loss_and_grads(model, guide, x))
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_a_subclass_has_its_own_way():
    class Doubled(pv.CompiledELBO):
        def loss_and_grads(self, *args, **kwargs):
            return 2 * super().loss_and_grads(*args, **kwargs)

    found = []
    for make in (pv.CompiledELBO, Doubled):
        torch.manual_seed(0)
        svi = pv.SVI(*pair(), adam(), loss=make(Trace_ELBO(), backend="eager"))
        found.append([svi.step(data()) for _ in range(3)])
    assert found[1] == pytest.approx([2 * loss for loss in found[0]])
