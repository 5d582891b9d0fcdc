"""PyroParams and autoguides of several pairs stay apart, whatever is called on them outside."""

import copy
import gc
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoLaplaceApproximation, AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn
from torch.distributions import constraints

import pyro_vae as pv

X = torch.tensor([-4.0, -3.0, 0.5, 3.0, 4.0])


def adam():
    return pyro.optim.Adam({"lr": 3e-2})


class Mixture(PyroModule):
    """The model of docs/mixture.md, with a PyroParam."""

    def __init__(self, start):
        super().__init__()
        self.mean = nn.Parameter(torch.tensor([-3.0, 3.0]))
        self.scale = PyroParam(torch.full((2,), start), constraint=constraints.positive)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.ones(2) / 2), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(self.mean[k], self.scale[k]))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


class Encoder(PyroModule):
    """Its PyroParam is in a submodule, or declared in the class."""

    def __init__(self, start):
        super().__init__()
        self.start = start
        self.inner = PyroModule()
        self.inner.width = PyroParam(torch.tensor(start), constraint=constraints.positive)

    @PyroParam(constraint=constraints.positive)
    def slope(self):
        return torch.tensor(self.start)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.slope * x, self.inner.width))


class Level(PyroModule):
    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        level = pyro.sample("level", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(level + self.shift, 1.0), obs=x)


def mixture(start):
    return Mixture(start), Encoder(start), TraceEnum_ELBO(max_plate_nesting=1)


def level(auto):
    def make(start):
        model = Level()
        model.shift.data.fill_(start)
        return model, auto(model), Trace_ELBO(max_plate_nesting=1)

    return make


PAIRS = {
    "PyroParams": mixture,
    "AutoNormal": level(AutoNormal),
    "AutoDiagonalNormal": level(AutoDiagonalNormal),
    "AutoDelta": level(AutoDelta),
    "AutoLaplaceApproximation": level(AutoLaplaceApproximation),
}
USES = {
    "the guide": lambda model, guide, elbo: guide(X),
    "both": lambda model, guide, elbo: elbo.loss(model, guide, X),
    "Predictive": lambda model, guide, elbo: Predictive(
        pyro.poutine.block(model, hide=["k"]), guide=guide, num_samples=2
    )(X),
    "compute_marginals": lambda model, guide, elbo: TraceEnum_ELBO(
        max_plate_nesting=1, strict_enumeration_warning=False
    ).compute_marginals(model, guide, X),
    "pyro.infer.SVI": lambda model, guide, elbo: pyro.infer.SVI(
        model, guide, adam(), loss=elbo
    ).evaluate_loss(X),
}


def state(*modules):
    return [copy.deepcopy(module.state_dict()) for module in modules]


def assert_same(before, after):
    torch.testing.assert_close(before, after, rtol=0, atol=0)


def trained(make, start, steps=3):
    model, guide, elbo = make(start)
    svi = pv.SVI(model, guide, adam(), loss=elbo)
    for _ in range(steps):
        svi.step(X)
    return model, guide, elbo, svi


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", PAIRS)
def test_pairs_that_are_used_outside_stay_apart(name, use):
    pairs = []
    for start in (0.5, 0.7, 0.9):
        model, guide, elbo, svi = trained(PAIRS[name], start)
        before = state(model, guide)
        USES[use](model, guide, elbo)
        assert_same(before, state(model, guide))
        pairs.append((model, guide, elbo, svi))
    before = [state(model, guide) for model, guide, _, _ in pairs]
    model, guide, elbo, svi = pairs[1]
    for _ in range(2):
        svi.step(X)
        USES[use](model, guide, elbo)
    for i, (model, guide, _, _) in enumerate(pairs):
        for old, new in zip(before[i], state(model, guide), strict=True):
            assert all(torch.equal(old[key], new[key]) == (i != 1) for key in old)


def test_models_that_only_generate_stay_apart():
    for start in (0.5, 0.7):
        model = Mixture(start)
        pv.generate(model, X)
        model(X)
        torch.testing.assert_close(model.scale.detach(), torch.full((2,), start))


@pytest.mark.parametrize("name", PAIRS)
def test_a_guide_that_runs_once_before_its_svi_leaves_nothing_for_the_next(name):
    """What the error about an autoguide's missing parameters advises."""
    pairs = []
    for start in (0.5, 0.7):
        model, guide, elbo = PAIRS[name](start)
        guide(X)
        svi = pv.SVI(model, guide, torch.optim.Adam(pv.parameters(model, guide), lr=0.1), loss=elbo)
        before = state(*pairs)
        svi.step(X)
        assert_same(before, state(*pairs))
        pairs += [model, guide]
    assert len({id(p) for module in pairs for p in module.parameters()}) == len(
        list(nn.ModuleList(pairs).parameters())
    )


class SameName(Encoder):
    @PyroParam(constraint=constraints.positive)
    def scale(self):
        return torch.tensor(self.start)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, self.scale))


def test_pyro_params_of_one_name_in_model_and_guide_are_two():
    model, guide = Mixture(0.5), SameName(0.7)
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    svi = pv.SVI(model, guide, adam(), loss=elbo)
    svi.step(X)
    before = model.scale, guide.scale
    assert before[1].item() == pytest.approx(0.7, abs=0.05)
    guide(X), elbo.loss(model, guide, X)
    assert_same(before, (model.scale, guide.scale))
    svi.step(X)
    assert (model.scale != before[0]).all()
    assert guide.scale != before[1]


class Declaring(Mixture):
    """Its PyroParam is declared in the class, so that it is made by a run."""

    def __init__(self, start):
        PyroModule.__init__(self)
        self.mean, self.start = nn.Parameter(torch.tensor([-3.0, 3.0])), start

    @PyroParam(constraint=constraints.positive)
    def scale(self):
        return torch.full((2,), self.start)


@pytest.mark.parametrize("make", [Mixture, Declaring])
def test_they_are_two_also_in_an_evaluation(make):
    model, guide = make(0.5), SameName(0.7)
    pv.elbo_terms(model, guide, X)
    assert model.scale.tolist() == pytest.approx([0.5, 0.5])
    assert guide.scale.item() == pytest.approx(0.7)


def test_a_name_is_given_once():
    model, guide, _, _ = trained(mixture, 0.5)
    model(X), guide(X)
    names = set(pyro.get_param_store().keys())
    pv.elbo_terms(model, guide, X)
    model(X), guide(X)
    assert set(pyro.get_param_store().keys()) == names


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_is_apart_from_its_original(name, how):
    model, guide, elbo, svi = trained(PAIRS[name], 0.5)
    twins = how((model, guide))
    assert "#pv" not in twins[1]._pyro_name
    guide(X)
    svi.step(X)
    before = state(*twins), state(model, guide)
    twins[1](X)
    pv.SVI(*twins, adam(), loss=elbo).evaluate_loss(X)
    guide(X)
    assert_same(before, (state(*twins), state(model, guide)))


def test_a_module_in_model_and_guide_stays_one():
    model, guide, elbo = mixture(0.5)
    model.shared = guide.inner
    pv.SVI(model, guide, adam(), loss=elbo).step(X)
    guide(X), model(X)
    assert model.shared is guide.inner
    assert len(pv.parameters(model, guide)) == 4
    assert list(model.state_dict()) == ["mean", "scale_unconstrained", "shared.width_unconstrained"]


# pyro.infer.SVI, and what others look up by name.


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_of_pyro_s_svi_keeps_its_names_under_evaluation_and_trains_on(name):
    found = []
    for evaluated in (True, False):
        pyro.clear_param_store()
        torch.manual_seed(3)
        model, guide, elbo = PAIRS[name](0.5)
        svi = pyro.infer.SVI(model, guide, adam(), loss=elbo)
        losses = [svi.step(X), svi.step(X)]
        names = set(pyro.get_param_store().keys())
        if evaluated:
            random_state = torch.get_rng_state()
            pv.explain(model, guide, elbo, X)
            torch.set_rng_state(random_state)
        losses += [svi.step(X), svi.step(X)]
        assert set(pyro.get_param_store().keys()) == names
        found.append((losses, names))
    assert found[0] == found[1]


def test_after_this_package_pyro_s_svi_trains_the_parameters_of_the_modules():
    for start in (0.5, 0.7):
        model, guide, elbo, _ = trained(mixture, start)
        before = state(model, guide)
        svi = pyro.infer.SVI(model, guide, adam(), loss=elbo)
        for _ in range(2):
            svi.step(X)
        for old, new in zip(before, state(model, guide), strict=True):
            for key in old:
                assert not torch.equal(old[key], new[key])


def test_a_pyro_sample_keeps_its_name():
    class Bayesian(PyroModule):
        def __init__(self):
            super().__init__()
            self.weight = PyroSample(dist.Normal(0.0, 1.0))
            self.inner = PyroModule()
            self.inner.scale = PyroParam(torch.tensor(1.0), constraint=constraints.positive)

        def forward(self, x):
            weight = self.weight
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(weight, self.inner.scale), obs=x)

    for start in (1.0, 2.0):
        model = Bayesian()
        model.inner.scale = torch.tensor(start)
        guide = AutoNormal(model)
        pv.SVI(model, guide, adam(), loss=Trace_ELBO()).evaluate_loss(X)
        assert set(guide(X)) == {"weight"}
        model(X)
        assert model.inner.scale.item() == pytest.approx(start)


def test_a_pyro_sample_that_a_class_declares_keeps_its_name():
    class Bayesian(PyroModule):
        def __init__(self):
            super().__init__()
            self.scale = PyroParam(torch.tensor(1.0), constraint=constraints.positive)

        @PyroSample
        def weight(self):
            return dist.Normal(0.0, 1.0)

        def forward(self, x):
            weight = self.weight
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(weight, self.scale), obs=x)

    model = Bayesian()
    guide = AutoNormal(model)
    pv.SVI(model, guide, adam(), loss=Trace_ELBO()).evaluate_loss(X)
    assert set(guide(X)) == {"weight"}


def test_modules_without_pyro_params_keep_their_names():
    model, _, _, _ = trained(level(AutoNormal), 0.5)
    assert model._pyro_name == ""


def test_parameters_of_modules_that_are_gone_leave_the_store():
    for _ in range(3):
        model, guide = trained(mixture, 0.5)[:2]
        guide(X), model(X)
    assert pyro.get_param_store()
    del model, guide
    gc.collect()
    trained(mixture, 0.5)
    assert not pyro.get_param_store()


# What cannot be prevented is refused.


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_that_pyro_made_one_before_are_refused(name):
    first, second = (PAIRS[name](start) for start in (0.5, 0.7))
    first[1](X), second[1](X)  # the store gives the second the parameters of the first
    pv.SVI(*first[:2], adam(), loss=first[2]).step(X)
    svi = pv.SVI(*second[:2], adam(), loss=second[2])
    for run in (svi.step, svi.evaluate_loss):
        with pytest.raises(ValueError, match="expected one for each module.*two of them.*clear_param_store"):
            run(X)
    # The fix.
    third = PAIRS[name](0.7)
    pyro.clear_param_store()
    third[1](X)
    pv.SVI(*third[:2], adam(), loss=third[2]).step(X)


def test_a_pyro_param_beside_a_pyro_sample_is_refused_where_pyro_made_it_one():
    class Both(PyroModule):
        def __init__(self):
            super().__init__()
            self.weight = PyroSample(dist.Normal(0.0, 1.0))
            self.scale = PyroParam(torch.tensor(1.0), constraint=constraints.positive)

        def forward(self, x):
            weight = self.weight
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(weight, self.scale), obs=x)

    for number in range(2):
        model = Both()
        guide = AutoNormal(model)
        svi = pv.SVI(model, guide, adam(), loss=Trace_ELBO())
        svi.step(X)
        model(X)
        if number:
            with pytest.raises(
                ValueError, match="'scale': expected one for each.*To fix: move it to a submodule"
            ):
                pv.explain(model, guide, Trace_ELBO(), X)
        kept = model  # noqa: F841, it lives on
