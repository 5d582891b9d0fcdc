"""CompiledELBO: the same numbers as eager, and an error where a graph would freeze something."""

import copy
import gc
import math
import platform
import random
import subprocess
import sys

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam
from registry import LIKELIHOODS, POSTERIORS, data, pair
from torch import nn
from torch._ops import OpOverload
from torch.distributions import constraints
from torch.fx.experimental.proxy_tensor import make_fx

import pyro_vae as pv
from pyro_vae.compiled.graph import Graph, _simplify
from pyro_vae.programs.pair import signature

ELBOS = {
    "trace": Trace_ELBO,
    "mean-field": TraceMeanField_ELBO,
    "graph": TraceGraph_ELBO,
    "particles": lambda: Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1),
    "renyi": lambda: RenyiELBO(alpha=0, num_particles=3, vectorize_particles=True, max_plate_nesting=1),
}


def eager_stream(elbo, **options):
    """Captured, and replayed one operation at a time."""
    return pv.CompiledELBO(elbo, backend="eager", **options)


def adam(lr=1e-2):
    return pyro.optim.Adam({"lr": lr})


def losses(svi, batches):
    torch.manual_seed(1)
    return [svi.step(*batch) if isinstance(batch, tuple) else svi.step(batch) for batch in batches]


def assert_same_training(programs, elbo, batches, svi_class=pv.SVI):
    """Eager and compiled, on twins: losses and parameters agree to float precision."""
    twins = copy.deepcopy(programs)
    eager = losses(pv.SVI(*programs, adam(), loss=elbo), batches)
    compiled = losses(svi_class(*twins, adam(), loss=eager_stream(elbo)), batches)
    assert compiled == pytest.approx(eager, rel=1e-5, abs=1e-4)
    for ours, theirs in zip(programs, twins, strict=True):
        if isinstance(ours, nn.Module):
            torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("elbo", ["trace", "mean-field"])
@pytest.mark.parametrize(
    ("likelihood", "posterior"),
    [(name, "diag-normal") for name in LIKELIHOODS] + [("bernoulli", name) for name in POSTERIORS],
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


def test_a_smaller_last_batch_has_its_own_graph():
    x = data(size=20)
    assert_same_training(pair(), Trace_ELBO(), 3 * [x[:8], x[8:16], x[16:]])


class Weighted(PyroModule):
    """A model whose likelihood is weighted by an argument."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, weight, scale=1.0):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.model.prior())
            logits = weight * scale * self.model.decoder[0](z)
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)


class Ignoring(PyroModule):
    def __init__(self, guide):
        super().__init__()
        self.guide = guide

    def forward(self, x, weight, scale=1.0):
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.guide.encoder(x))


def weighted_pair():
    model, guide = pair()
    return Weighted(model), Ignoring(guide)


def test_a_new_value_of_an_argument_is_used():
    x = data()
    tensors = [(x, torch.tensor(weight)) for weight in (0.1, 0.5, 1.0, 2.0)]
    assert_same_training(weighted_pair(), Trace_ELBO(), tensors)
    numbers = [(x, weight) for weight in (0.1, 0.5, 0.1, 2.0)]
    assert_same_training(weighted_pair(), Trace_ELBO(), numbers)


def test_keyword_arguments_are_used():
    programs = weighted_pair()
    twins = copy.deepcopy(programs)
    eager = pv.SVI(*programs, adam(), loss=Trace_ELBO())
    compiled = pv.SVI(*twins, adam(), loss=eager_stream(Trace_ELBO()))
    for scale in (1.0, 3.0, torch.tensor(0.5), torch.tensor(4.0)):
        results = []
        for svi in (eager, compiled):
            torch.manual_seed(0)  # of the batch, and of the step
            results.append(svi.step(data(), torch.tensor(1.0), scale=scale))
        assert results[0] == pytest.approx(results[1], rel=1e-5)


class Normed(PyroModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.3), nn.Linear(5, 4), pv.DiagNormal()
        )

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.net(x))


def test_batch_norm_and_dropout_are_those_of_eager():
    """Running statistics included, and one count a step: assert_same_training compares state_dicts."""
    assert_same_training((pair()[0], Normed()), Trace_ELBO(), 10 * [data(size=16)])


def test_train_and_eval_mode_have_their_own_graphs():
    programs = pair()[0], Normed()
    svi = pv.SVI(*programs, adam(), loss=eager_stream(Trace_ELBO()))
    plain = pv.SVI(*programs, adam(), loss=Trace_ELBO())
    x = data(size=16)
    svi.step(x)
    before = copy.deepcopy(programs[1].state_dict())
    for seed in range(3):
        torch.manual_seed(seed)
        compiled = svi.evaluate_loss(x)
        torch.manual_seed(seed)
        assert plain.evaluate_loss(x) == pytest.approx(compiled, rel=1e-6)
    torch.testing.assert_close(before, programs[1].state_dict(), rtol=0, atol=0)
    svi.step(x)
    assert programs[1].net[1].num_batches_tracked == 2


def test_a_step_in_eval_mode_is_not_that_of_train_mode():
    programs = pair()[0], Normed()
    svi = pv.SVI(*programs, adam(0.0), loss=eager_stream(Trace_ELBO()))
    plain = pv.SVI(*programs, adam(0.0), loss=Trace_ELBO())
    x = data(size=16)
    svi.step(x)
    programs[1].net.eval()  # the part inside alone: batch norm and dropout
    losses = []
    for each in (svi, plain):
        torch.manual_seed(0)
        losses.append(each.step(x))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_autocast_has_its_own_graph():
    programs = pair(width=64)
    x = data(width=64, size=32)
    svi = pv.SVI(*programs, adam(0.0), loss=eager_stream(Trace_ELBO()))
    plain = pv.SVI(*programs, adam(0.0), loss=Trace_ELBO())
    svi.step(x)
    losses = {}
    for name, each in (("compiled", svi), ("eager", plain)):
        for reduced in (True, False):
            torch.manual_seed(0)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=reduced):
                losses[name, reduced] = each.step(x)
    assert losses["compiled", True] == pytest.approx(losses["eager", True], rel=1e-5)
    assert losses["compiled", False] == pytest.approx(losses["eager", False], rel=1e-6)
    assert losses["eager", True] != losses["eager", False]


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


@pytest.mark.filterwarnings("default")  # torch 2.11's compiler uses what torch deprecates
@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("assigning", [False, True])
@pytest.mark.parametrize("p", [[0.5, 0.5], [0.3, 0.7, 0.0]], ids=["possible", "one-impossible"])
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


@pytest.mark.parametrize("elbo", [Trace_ELBO(num_particles=2), Trace_ELBO()])
def test_a_weight_that_is_used_twice_under_autocast(elbo):
    """Its gradients are added before they are rounded, as they are in Pyro without autocast's cache."""
    decoder = nn.Sequential(pv.MLP(16, 20, 34), pv.Bernoulli())
    encoder = nn.Sequential(pv.MLP(34, 20, 32), pv.DiagNormal())
    model = pv.Model(pv.VampPrior(encoder, torch.rand(4, 34)), decoder)
    guide, x = pv.Guide(encoder), data(width=34)
    trained, found = pv.parameters(model, guide), []
    for each in (elbo, eager_stream(elbo)):
        for p in trained:
            p.grad = None
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=each is not elbo):
            found.append((each.loss_and_grads(model, guide, x), [p.grad for p in trained]))
            assert torch.is_autocast_cache_enabled() == (each is not elbo)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


class Shifted(PyroModule):
    """A model that closes over a tensor."""

    def __init__(self, shift):
        super().__init__()
        self.net, self.family, self.shift = nn.Linear(2, 6), pv.Gaussian(0.3), shift

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", pv.StandardNormal(2)())
            pyro.sample("x", self.family(self.net(z) + self.shift), obs=x)


@pytest.mark.filterwarnings("default")  # torch 2.11's compiler uses what torch deprecates
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


class Buffered(PyroModule):
    """A guide that adds a buffer of zeros."""

    def __init__(self, program):
        super().__init__()
        self.program = program
        self.register_buffer("zeros", torch.zeros(8, 6))

    def forward(self, x):
        return self.program(x + self.zeros)


@pytest.mark.filterwarnings("default")  # torch 2.11's compiler uses what torch deprecates
@pytest.mark.parametrize("what", ["program.encoder.0.0.weight", "zeros"])
def test_a_parameter_or_a_buffer_may_be_laid_out_anew(what):
    model, guide = pair("gaussian")
    guide = Buffered(guide)
    elbo, x = pv.CompiledELBO(Trace_ELBO()), data("gaussian")
    elbo.loss_and_grads(model, guide, x)
    guide.zero_grad()
    tensor = {**dict(guide.named_parameters()), **dict(guide.named_buffers())}[what]
    tensor.data = tensor.data.t().contiguous().t()
    losses = []
    for each in (elbo, Trace_ELBO()):
        torch.manual_seed(0)
        losses.append(each.loss_and_grads(model, guide, x))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


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


# What JitTrace_ELBO gets wrong.


def test_the_gradient_is_not_doubled():
    model, guide = pair()
    x = data()
    trained = pv.parameters(model, guide)
    torch.manual_seed(0)
    loss = Trace_ELBO().differentiable_loss(model, guide, x)
    expected = torch.autograd.grad(loss, trained)
    torch.manual_seed(0)
    eager_stream(Trace_ELBO()).loss_and_grads(model, guide, x)
    torch.testing.assert_close([p.grad for p in trained], list(expected))
    torch.manual_seed(0)
    eager_stream(Trace_ELBO()).loss_and_grads(model, guide, x)  # and is added to what is there
    torch.testing.assert_close([p.grad for p in trained], [2 * g for g in expected])


@pytest.mark.parametrize("elbo", ["trace", "mean-field"])
def test_python_runs_at_the_first_step_only(elbo):
    model, guide = pair()
    calls = []
    guide.encoder[0].register_forward_hook(lambda *_: calls.append(1))
    svi = pv.SVI(model, guide, adam(), loss=eager_stream(ELBOS[elbo]()))
    x = data()
    svi.step(x)
    at_first = len(calls)
    for _ in range(5):
        svi.step(x)
    assert len(calls) == at_first


def test_a_second_pair_does_not_see_the_first_one_s_graph():
    elbo = eager_stream(Trace_ELBO())
    x = data()
    for _ in range(2):
        torch.manual_seed(random.randrange(100))
        programs = pair()
        compiled = pv.SVI(*programs, adam(0.0), loss=elbo)
        plain = pv.SVI(*programs, adam(0.0), loss=Trace_ELBO())
        for svi in (compiled, plain):
            svi.evaluate_loss(x)
        torch.manual_seed(0)
        expected = plain.step(x)
        torch.manual_seed(0)
        assert compiled.step(x) == pytest.approx(expected, rel=1e-6)


def test_the_random_stream_advances():
    svi = pv.SVI(*pair(), adam(0.0), loss=eager_stream(Trace_ELBO()))
    x = data()
    assert len({svi.step(x) for _ in range(5)}) == 5


@pytest.mark.filterwarnings("default")  # torch 2.11's compiler uses what torch deprecates
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


def test_without_a_compiler_the_mend_is_named_and_nothing_changes(monkeypatch):
    def fail(*_):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found")

    monkeypatch.setattr("torch._inductor.compile", fail)
    programs, x = pair(), data()
    before = copy.deepcopy([p.state_dict() for p in programs])
    svi = pv.SVI(*programs, adam(), loss=pv.CompiledELBO(Trace_ELBO()))
    state = torch.get_rng_state()
    for _ in range(2):
        with pytest.raises(
            ValueError, match="No working C\\+\\+ compiler.*To fix: install one.*backend='eager'"
        ):
            svi.step(x)
    assert torch.equal(torch.get_rng_state(), state)
    for program, values in zip(programs, before, strict=True):
        torch.testing.assert_close(program.state_dict(), values, rtol=0, atol=0)


def test_a_backend_is_one_of_two():
    with pytest.raises(ValueError, match="backend is 'inductor', or 'eager'.*got 'tensorrt'"):
        pv.CompiledELBO(Trace_ELBO(), backend="tensorrt")


def test_a_plain_module_is_captured_once(monkeypatch):
    """SVI gives an ELBO a program that makes parameter statements: the same at every step."""

    class Plain(nn.Module):
        def __init__(self, program):
            super().__init__()
            self.program = program

        def forward(self, x):
            return self.program(x)

    captured = []
    capture = Graph.__init__
    monkeypatch.setattr(Graph, "__init__", lambda *args: (captured.append(args[0]), capture(*args))[1])
    svi = pv.SVI(*map(Plain, pair()), adam(), loss=eager_stream(Trace_ELBO()))
    for _ in range(3):
        svi.step(data())
    assert len(captured) == 1


def test_many_graphs_are_told_of_once(monkeypatch):
    monkeypatch.setattr("pyro_vae.compiled.elbo._MANY", 5)
    model, guide = pair()
    programs = (lambda x, number: model(x)), (lambda x, number: guide(x))
    elbo, x = eager_stream(Trace_ELBO()), data(size=2)
    for number in range(4):
        elbo.loss(*programs, x, number)
    with pytest.warns(UserWarning, match="captured 5 graphs.*Pass numbers as tensors"):
        elbo.loss(*programs, x, 4)
    elbo.loss(*programs, x, 5)


def test_the_first_signature_is_compiled_at_once_and_another_when_it_comes_often(monkeypatch):
    compiled = []
    monkeypatch.setattr(Graph, "compile", lambda self: compiled.append(self))
    svi = pv.SVI(*pair(), adam(), loss=pv.CompiledELBO(Trace_ELBO()))
    x = data(size=12)
    svi.evaluate_loss(x)
    assert not compiled
    for step in range(25):
        svi.step(x)
        svi.step(x[:5])
        assert len(compiled) == (1 if step < 20 else 2)
    assert len(set(compiled)) == 2


# What a graph would freeze, or cannot hold.


class Odd(PyroModule):
    """A model that does one odd thing."""

    def __init__(self, odd):
        super().__init__()
        self.odd = odd
        self.calls = 0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", pv.StandardNormal(2)())
            loc = z.sum(-1, keepdim=True) + self.odd(self, z)
            pyro.sample("x", dist.Normal(loc.expand(-1, 6), 1.0).to_event(1), obs=x)


def branch(model, z):
    return 1.0 if z.detach().sum() > 0 else 0.0


def read(model, z):
    return float(z.detach().sum())


def array(model, z):
    return float(z.detach().numpy().sum())


def coerced(model, z):
    return float(np.asarray(z.detach()).sum())


def listed(model, z):
    return z.tolist()[0][0]


def length(model, z):
    return float(len(z[z > 0]))


def selected(model, z):
    return z.masked_select(z > 0).sum()


def count(model, z):
    model.calls += 1
    return float(model.calls)


def python_random(model, z):
    return random.random()


def rebind(model, z):
    model.seen = model.seen + 1
    return model.seen


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        (branch, "cannot capture this pair: test_compiled.py, line .*sum.. > 0.*torch.where"),
        (read, "cannot capture this pair: test_compiled.py, line .*float.z.detach"),
        (array, "cannot capture this pair: test_compiled.py, line .*numpy reads a tensor into Python"),
        (coerced, "cannot capture this pair: test_compiled.py, line .*asarray.*reads a tensor into Python"),
        (listed, "cannot capture this pair: test_compiled.py, line .*tolist reads a tensor into Python"),
        (length, "cannot capture this pair: the shape of aten.* depends on values"),
        (selected, "cannot capture this pair: the shape of aten.masked_select.* depends on values"),
        (count, "does not repeat the pair.*counter"),
        (python_random, "does not repeat the pair.*Python or NumPy random"),
        (rebind, "sets the buffer 'seen' of Odd anew.*copy_"),
    ],
)
def test_what_cannot_be_captured_is_refused_by_its_line(odd, message):
    guide = pair("gaussian")[1]
    svi = pv.SVI(Odd(odd), guide, adam(), loss=eager_stream(Trace_ELBO()))
    with pytest.raises(ValueError, match=f"(?s){message}"):
        svi.step(data("gaussian"))


def test_an_attribute_set_anew_is_found_by_check():
    """A Python number that somebody else changes between steps cannot be seen by the graph."""
    model, guide = Odd(lambda model, z: model.calls), pair("gaussian")[1]
    svi = pv.SVI(model, guide, adam(), loss=eager_stream(Trace_ELBO(), check=True))
    x = data("gaussian")
    for _ in range(3):
        svi.step(x)
    model.calls = 5
    with pytest.raises(ValueError, match="does not repeat the pair.*attribute set anew"):
        svi.step(x)


def test_a_tensor_the_model_closes_over_stays_live():
    shift = torch.tensor(0.0)
    model, guide = Odd(lambda model, z: shift), pair("gaussian")[1]
    compiled = pv.SVI(model, guide, adam(0.0), loss=eager_stream(Trace_ELBO()))
    plain = pv.SVI(model, guide, adam(0.0), loss=Trace_ELBO())
    x = data("gaussian")
    for value in (0.0, 3.0, -7.0):
        shift.fill_(value)
        torch.manual_seed(0)
        expected = plain.step(x)
        torch.manual_seed(0)
        assert compiled.step(x) == pytest.approx(expected, rel=1e-6)


class Targeted(PyroModule):
    """Reads x and observes y; holds a reference, and two parameters whose sum alone is used."""

    def __init__(self, x):
        super().__init__()
        self.ref = x
        self.a, self.b = (nn.Parameter(torch.zeros(2)) for _ in range(2))

    def model(self, x, y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(z + self.ref.mean(0) + (self.a + self.b), 1.0).to_event(1), obs=y)

    def guide(self, x, y):
        with pyro.plate("data", len(y)):
            x = torch.as_tensor(x["x"] if isinstance(x, dict) else x)
            pyro.sample("z", dist.Normal(x, 0.5).to_event(1))


def loss_of(elbo, pair, *batch):
    torch.manual_seed(0)
    return elbo.loss(pair.model, pair.guide, *batch)


def test_one_tensor_given_twice_is_two_inputs():
    """And so is one that the pair holds: the next step may bring other tensors."""
    x, y, w = torch.randn(3, 4, 2)
    pair, elbo = Targeted(x), eager_stream(Trace_ELBO())
    for batch in ((x, x), (x, y), (y, x), (w, y)):
        assert loss_of(elbo, pair, *batch) == pytest.approx(loss_of(Trace_ELBO(), pair, *batch), rel=1e-5)


class Record(dict):
    """A container that torch does not know."""


@pytest.mark.parametrize(
    ("wrap", "name"), [(torch.Tensor.numpy, "ndarray"), (lambda x: Record(x=x), "Record")]
)
def test_an_argument_that_a_graph_would_keep_is_refused(wrap, name):
    x = torch.randn(4, 2)
    with pytest.raises(ValueError, match=f"the first {name} that it is given.*torch.as_tensor"):
        loss_of(eager_stream(Trace_ELBO()), Targeted(x), wrap(x), x)


def test_handlers_around_are_told_apart_by_what_they_hold():
    x, y = torch.randn(2, 4, 2)
    pair, elbo = Targeted(x), eager_stream(Trace_ELBO())
    for value in (x, y, x):
        with poutine.condition(data={"y": value}):
            assert loss_of(elbo, pair, x, y) == pytest.approx(loss_of(Trace_ELBO(), pair, x, y), rel=1e-5)
    assert elbo.num_graphs == 2


def test_numbers_of_different_kinds_have_their_own_graphs():
    assert len({signature((1,)), signature((True,)), signature((1.0,))}) == 3


def test_an_operation_is_not_taken_for_torch_s_of_its_name():
    """A graph that is replayed calls torch.neg for aten.neg, but not for another library's."""
    library = torch.library.Library("another_library", "DEF")
    library.define("neg(Tensor x) -> Tensor", tags=(torch.Tag.pointwise,))
    library.impl("neg", lambda x: 2 * x, "CompositeExplicitAutograd")

    def function(x):
        where = [None, torch.tensor([0, 2])]  # which torch.index_put does not take
        chosen = torch.ops.aten.index_put(torch.zeros(2, 3), where, torch.ones(()))
        return torch.ops.another_library.neg(x) + chosen

    x = torch.arange(3.0)
    expected = torch.tensor([[1.0, 2.0, 5.0]]).expand(2, 3)
    torch.testing.assert_close(Graph(function, (), (x,), {})(x), expected)


def test_gradients_share_no_memory():
    """Else what works in place on gradients, as clipping does, would do so twice."""
    x = torch.randn(4, 2)
    pair = Targeted(x)
    elbo = eager_stream(Trace_ELBO())
    elbo.loss_and_grads(pair.model, pair.guide, x, x)
    torch.testing.assert_close(pair.a.grad, pair.b.grad)
    assert pair.a.grad.data_ptr() != pair.b.grad.data_ptr()


def test_a_graph_keeps_what_its_results_come_of_and_what_it_changes():
    def function(x, count, mean, variance):
        torch.rand(2)  # moves the random state
        count.add_(1)
        torch.nn.functional.batch_norm(x.expand(2, 3), mean, variance, training=True)
        torch._assert_async((x >= 0).all())
        (5 * x).sum()
        zeros, ones = (lambda: torch.zeros(3)), (lambda: torch.ones(3))
        written = zeros()
        written[0] = 7
        noise = [torch.normal(zeros(), ones()), torch.normal(ones(), ones()), torch.normal(written, ones())]
        wide = torch.normal(torch.zeros(1), ones())
        return (sum(noise) + wide + x.expand(3).view(3)).detach()

    def inputs():
        return torch.arange(3.0), torch.zeros(()), torch.zeros(3), torch.ones(3)

    captured = make_fx(function)(*inputs())
    once, again = inputs(), inputs()
    torch.manual_seed(0)
    expected = captured(*once)
    _simplify(captured.graph)
    captured.recompile()
    torch.manual_seed(0)
    torch.testing.assert_close(captured(*again), expected, rtol=0, atol=0)
    torch.testing.assert_close(once, again, rtol=0, atol=0)
    kept = [
        node.target.overloadpacket for node in captured.graph.nodes if isinstance(node.target, OpOverload)
    ]
    aten = torch.ops.aten
    assert kept.count(aten.randn) == 1
    assert kept.count(aten.normal) == 3
    assert kept.count(aten._assert_async) == 1
    assert not {aten.sum, aten.view, aten.alias} & set(kept)


def test_statistics_behind_which_nothing_comes_are_updated():
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
    for loss in (Trace_ELBO(), eager_stream(Trace_ELBO())):
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


def test_loaded_and_frozen_parameters_are_seen():
    programs = pair()
    other = [copy.deepcopy(module.state_dict()) for module in pair()]
    svi = pv.SVI(*programs, adam(), loss=eager_stream(Trace_ELBO()))
    x = data()
    svi.step(x)
    for module, tensors in zip(programs, other, strict=True):
        module.load_state_dict(tensors)
    torch.manual_seed(0)
    loss = svi.evaluate_loss(x)
    torch.manual_seed(0)
    assert pv.SVI(*programs, adam(), loss=Trace_ELBO()).evaluate_loss(x) == pytest.approx(loss)
    programs[0].requires_grad_(False)
    svi.optimizer.zero_grad()
    svi.step(x)
    assert all(p.grad is None for p in programs[0].parameters())


def test_a_swapped_module_without_parameters_is_seen():
    network = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 6))
    programs = pv.Model(pv.StandardNormal(2), nn.Sequential(network, pv.Bernoulli())), pair()[1]
    x, results = data(), []
    for elbo in (Trace_ELBO(), eager_stream(Trace_ELBO())):
        model, guide = copy.deepcopy(programs)
        svi = pv.SVI(model, guide, adam(), loss=elbo)
        torch.manual_seed(1)
        svi.step(x)
        model.decoder[0][1] = nn.Tanh()
        results.append([svi.step(x) for _ in range(3)])
    assert results[1] == pytest.approx(results[0], rel=1e-6)


class Kind(PyroModule):
    def forward(self, x, weights):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            loc = z.sum(-1, keepdim=True) + (5.0 if isinstance(weights, list) else 0.0)
            pyro.sample("x", dist.Normal(loc.expand(-1, 6), 1.0).to_event(1), obs=x)


def test_a_list_is_not_a_tuple():
    x = data("gaussian")
    guide = Ignoring(pair("gaussian")[1])
    assert_same_training((Kind(), guide), Trace_ELBO(), [(x, (1,)), (x, [1]), (x, (1,))])


def test_a_bad_value_is_found_in_a_compiled_step():
    programs = pair()
    svi = pv.SVI(*programs, adam(), loss=eager_stream(Trace_ELBO()))
    x = data()
    svi.step(x)
    before = copy.deepcopy([module.state_dict() for module in programs])
    bad = x.clone()
    bad[0, 0] = 0.5
    for method in (svi.step, svi.evaluate_loss):
        with pytest.raises(ValueError, match="'x'.*outside its support in 1 of"):
            method(bad)
    after = [module.state_dict() for module in programs]
    torch.testing.assert_close(before, after, rtol=0, atol=0)


class Sharp(PyroModule):
    """A model that adds `function(w)`, which is 0 at w = 0, to the mean of x."""

    def __init__(self, function, width=1):
        super().__init__()
        self.function = function
        self.w = nn.Parameter(torch.zeros(width))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", pv.StandardNormal(2)())
            loc = z.sum(-1, keepdim=True) + self.function(self.w).sum()
            pyro.sample("x", dist.Normal(loc.expand(-1, 6), 1.0).to_event(1), obs=x)


def test_a_gradient_that_is_not_finite_stops_a_compiled_step():
    model, guide = Sharp(lambda w: (w * w).sqrt()), pair()[1]  # whose slope at 0 is NaN
    x = data()
    model.w.data.fill_(1.0)
    elbo = eager_stream(Trace_ELBO())
    svi = pv.SVI(model, guide, adam(), loss=elbo)
    svi.step(x)
    svi.optimizer.zero_grad()
    model.w.data.zero_()
    before = copy.deepcopy((model.state_dict(), guide.state_dict(), svi.optimizer.state_dict()["state"]))
    with pytest.raises(ValueError, match="A gradient is not finite.*site 'x' of the model, Normal"):
        svi.step(x)
    with pytest.raises(FloatingPointError, match="A gradient is not finite") as caught:
        elbo.loss_and_grads(model, guide, x)
    assert "pyro_vae.SVI names the site" in caught.value.__notes__[0]
    assert all(p.grad is None for p in pv.parameters(model, guide))
    after = model.state_dict(), guide.state_dict(), svi.optimizer.state_dict()["state"]
    torch.testing.assert_close(before, after, rtol=0, atol=0)


def test_a_pair_with_nothing_to_train_has_a_loss():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", pv.StandardNormal(6)())
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0).to_event(1))

    x, found = data(), []
    for elbo in (eager_stream(Trace_ELBO()), Trace_ELBO()):
        torch.manual_seed(0)
        found.append(elbo.loss_and_grads(model, guide, x))
    assert found[0] == pytest.approx(found[1])


@pytest.mark.parametrize("around", [eager_stream, lambda elbo: elbo], ids=["compiled", "eager"])
def test_finite_gradients_whose_sum_overflows_are_taken(around):
    torch.manual_seed(0)
    model, guide = Sharp(lambda w: 1e37 * w, width=200), pair()[1]
    svi = pv.SVI(model, guide, torch.optim.SGD([model.w], lr=1e-36), loss=around(Trace_ELBO()))
    svi.step(torch.ones(1, 6))
    gradient = model.w.grad
    assert gradient.isfinite().all()
    assert not gradient.sum().isfinite()
    assert model.w.isfinite().all()
    assert (model.w != 0).all()


@pytest.mark.parametrize("around", [eager_stream, lambda elbo: elbo], ids=["compiled", "eager"])
def test_the_gradient_of_a_parameter_outside_the_optimiser_may_be_anything(around):
    model, guide = Sharp(lambda w: (w * w).sqrt()), pair()[1]
    svi = pv.SVI(model, guide, torch.optim.Adam(guide.parameters()), loss=around(Trace_ELBO()))
    svi.step(data())
    assert model.w.grad.isnan().all()
    assert all(p.isfinite().all() for p in guide.parameters())


class Mixed(PyroModule):
    """A guide whose parameters' gradients come as a transpose and as an expansion."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(2, 6, generator=generator) / 3)
        self.shift = nn.Parameter(torch.randn(5, generator=generator))
        self.spread = nn.Parameter(torch.zeros(2))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            loc = torch.einsum("bi,oi->bo", x, self.weight) + self.shift.sum()
            pyro.sample("z", dist.Normal(loc, self.spread.exp()).to_event(1))


@pytest.mark.filterwarnings("default")  # torch 2.11's compiler uses what torch deprecates
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_gradients_lie_in_memory_as_their_parameters_do(backend):
    """Torch's fused Adam takes for granted that they do."""
    programs = pair()[0], Mixed()
    twins = copy.deepcopy(programs)
    batches = [data()] * 5
    losses(pv.SVI(*programs, adam(), loss=Trace_ELBO()), batches)
    optimizer = torch.optim.Adam(pv.parameters(*twins), lr=1e-2, fused=True)
    elbo = pv.CompiledELBO(Trace_ELBO(), backend=backend)
    losses(pv.SVI(*twins, optimizer, loss=elbo), batches)
    torch.testing.assert_close(programs[1].state_dict(), twins[1].state_dict(), rtol=1e-4, atol=1e-6)
    assert all(p.grad.stride() == p.stride() for p in pv.parameters(*twins))


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


def test_a_second_pair_in_pyro_s_store_is_refused():
    elbo = eager_stream(Trace_ELBO())
    x = data()
    pyro.infer.SVI(*pair(), adam(), loss=elbo).step(x)
    with pytest.raises(ValueError, match="would not train some of this pair's parameters.*clear_param_store"):
        pyro.infer.SVI(*pair(), adam(), loss=elbo).step(x)


@pytest.mark.parametrize("elbo", [None, Trace_ELBO, pv.CompiledELBO(Trace_ELBO())])
def test_only_an_elbo_is_compiled(elbo):
    with pytest.raises(ValueError, match="expects a Pyro ELBO"):
        pv.CompiledELBO(elbo)


def test_nothing_is_left_behind_by_a_capture():
    """The random state, the buffers, the validation flag and the tracing state are as before."""
    programs = pair()[0], Normed()
    x = data(size=16)
    before = copy.deepcopy(programs[1].state_dict()), torch.get_rng_state()
    elbo = eager_stream(Trace_ELBO())
    elbo._loss(*programs, (x,), {}, gradients=True)
    torch.testing.assert_close(before, (programs[1].state_dict(), torch.get_rng_state()), rtol=0, atol=0)
    assert not torch._C._get_tracing_state()
    assert pyro.infer.util.is_validation_enabled()
    assert all(p.grad is None for p in programs[1].parameters())


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_is_as_before_a_capture(enabled):
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        eager_stream(Trace_ELBO()).loss(*pair(), data())
        assert gc.isenabled() == enabled
        with pytest.raises(ValueError, match="cannot capture"):
            eager_stream(Trace_ELBO()).loss(Odd(branch), pair()[1], data())
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()


def test_one_long_autocast_holds_a_second_capture_against_today_s_parameters():
    """The eager run that a capture is held against would find an earlier step's in autocast's cache."""
    model, guide = pair(width=64, hidden=40)
    x = data(width=64, size=32)
    elbo = eager_stream(Trace_ELBO())
    with torch.autocast("cpu", torch.bfloat16):
        elbo.loss_and_grads(model, guide, x)
        with torch.no_grad():
            for p in pv.parameters(model, guide):
                p.mul_(1.5)
        torch.manual_seed(0)
        found = elbo.loss_and_grads(model, guide, x[:16])
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        assert found == pytest.approx(Trace_ELBO().loss(model, guide, x[:16]), rel=1e-5)


def test_one_long_autocast_shows_today_s_parameters_between_captured_steps():
    model, guide = pair(width=64, hidden=40)
    svi = pv.SVI(model, guide, adam(0.05), loss=eager_stream(Trace_ELBO()))
    x = data(width=64)
    with torch.autocast("cpu", torch.bfloat16):
        svi.step(x)
        before = guide.encoder[0](x).detach()
        svi.step(x)
        assert not torch.equal(guide.encoder[0](x), before)


def test_what_is_nan_in_both_is_repeated():
    model, guide = pair()
    with torch.no_grad():
        model.decoder[0][0].weight.fill_(math.nan)
    assert math.isnan(eager_stream(Trace_ELBO()).loss(model, guide, data()))


def test_a_weight_beside_a_batch_of_16_bits_keeps_its_precision():
    class Widened(PyroModule):
        def __init__(self, program):
            super().__init__()
            self.program = program

        def forward(self, x):
            return self.program(x.float())

    model, guide = map(Widened, pair())
    x = data().bfloat16()
    elbo = eager_stream(Trace_ELBO())
    for beta in (0.5, 100.3):  # the second is 100.5 in bfloat16
        losses = []
        for each in (elbo, Trace_ELBO()):
            torch.manual_seed(0)
            with pv.scale_latents(beta):
                losses.append(each.loss(model, guide, x))
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


MEMORY = """
import resource, pyro, torch
from pyro.infer import Trace_ELBO
from torch import nn
import pyro_vae as pv
model = pv.Model(pv.StandardNormal(2), nn.Sequential(pv.MLP(2, 8, 784), pv.Bernoulli()))
guide = pv.Guide(nn.Sequential(pv.MLP(784, 8, 4), pv.DiagNormal()))
loss = pv.CompiledELBO(Trace_ELBO(), backend="eager")
svi = pv.SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), loss=loss)
x = torch.ones(1024, 784)
for steps in (3, 5):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(steps):
        svi.step(x)
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // steps)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about the memory allocator of glibc")
def test_a_step_does_not_fault_in_its_memory_again():
    # In a process of its own, as the allocator goes by all that its process has freed.
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    pages = 1024 * 784 * 4 // 4096  # of one tensor of the size of a batch
    assert int(run.stdout) < pages
