"""Copies, by copy.deepcopy, pickle and torch.save: they train on alike, and leave the original alone."""

import copy
import functools
import io
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceGraph_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam
from registry import PlainVAE, data, each_once, pair
from torch.distributions import constraints

import pyro_vae as pv


def saved_and_loaded(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIERS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),
    "torch.save": saved_and_loaded,
}


class Level(PyroModule):
    def __init__(self):
        super().__init__()
        self.scale = PyroParam(torch.tensor(0.9), constraint=constraints.positive)

    def forward(self, x):
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(level, self.scale), obs=x[:, 0])


def methods():
    vae = PlainVAE()
    return vae.model, vae.guide


def guided_by(auto):
    def make():
        model = Level()
        return model, auto(model)

    return make


def partial_methods():
    vae = PlainVAE()
    return functools.partial(vae.model), functools.partial(vae.guide)


PAIRS = {
    "modules": pair,
    "methods": methods,
    "partials of methods": partial_methods,
    "inside scale_latents": lambda: tuple(pv.scale_latents(0.5)(program) for program in pair()),
    "inside mask_missing": lambda: pv.mask_missing(*pair()),
    "inside a handler": lambda: tuple(poutine.scale(program, scale=0.5) for program in methods()),
    "AutoNormal": guided_by(AutoNormal),
    "AutoDiagonalNormal": guided_by(AutoDiagonalNormal),
}
ELBOS = {
    "Trace": Trace_ELBO,
    "TraceGraph": TraceGraph_ELBO,
    "compiled": lambda: pv.CompiledELBO(Trace_ELBO(), backend="eager"),
}
OPTIMISERS = {
    "PyroOptim": lambda model, guide: pyro.optim.Adam({"lr": 1e-2}),
    "torch": lambda model, guide: torch.optim.Adam(pv.parameters(model, guide), lr=1e-2),
}


def losses(svi, steps=3):
    torch.manual_seed(5)
    return [svi.step(data()) for _ in range(steps)]


@pytest.mark.parametrize(("programs", "how", "elbo"), each_once(PAIRS, COPIERS, ELBOS))
def test_a_copy_of_an_svi_trains_on_alike_and_apart(programs, how, elbo):
    if programs == "inside a handler":
        how = "deepcopy"  # Python refuses to pickle a handler of Pyro
    for optimiser in OPTIMISERS.values():
        model, guide = PAIRS[programs]()
        guide(data())
        svi = pv.SVI(model, guide, optimiser(model, guide), loss=ELBOS[elbo]())
        svi.step(data())
        twin = COPIERS[how](svi)
        before = [p.detach().clone() for p in pv.parameters(model, guide)]
        of_twin = losses(twin)
        for old, p in zip(before, pv.parameters(model, guide), strict=True):
            assert torch.equal(old, p)
        assert losses(svi) == of_twin
        for p, q in zip(*(pv.parameters(each.model, each.guide) for each in (svi, twin)), strict=True):
            assert torch.equal(p, q)


@pytest.mark.parametrize("how", COPIERS)
@pytest.mark.parametrize("programs", ["modules", "methods", "AutoNormal"])
def test_a_copy_of_a_pair_is_the_same_pair_apart(programs, how):
    model, guide = PAIRS[programs]()
    svi = pv.SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), loss=Trace_ELBO())
    svi.step(data())
    twins = COPIERS[how]((model, guide))
    expected = [p.detach().clone() for p in pv.parameters(*twins)]
    found = []
    for programs_ in (twins, (model, guide)):
        torch.manual_seed(2)
        found.append(pv.explain(*programs_, Trace_ELBO(), data()).elbo)
    assert found[0] == found[1]
    svi.step(data())
    assert all(torch.equal(p, q) for p, q in zip(expected, pv.parameters(*twins), strict=True))


def wrapped():
    model, guide = pair()

    @functools.wraps(model)
    def run(x):
        return model(x)

    return run, guide


@pytest.mark.parametrize(
    "around",
    [
        lambda program: program,
        functools.partial,
        pv.scale_latents(1.0),
        lambda program: functools.partial(lambda *args, inner: inner(*args), inner=program),
    ],
)
@pytest.mark.parametrize("how", COPIERS)
def test_a_function_around_a_module_which_python_does_not_copy_is_refused(how, around):
    model, guide = wrapped()
    svi = pv.SVI(around(model), around(guide), pyro.optim.Adam({"lr": 1e-2}), loss=Trace_ELBO())
    for _ in range(2):  # before the optimiser is made, and after
        with pytest.raises(ValueError, match="A copy of SVI: .*the function 'run' around a module"):
            COPIERS[how](svi)
        svi.step(data())


@pytest.mark.parametrize("how", COPIERS)
def test_an_autoguide_that_lost_its_model_in_a_copy_is_refused(how):
    model, guide = guided_by(AutoNormal)()
    svi = pv.SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), loss=Trace_ELBO())
    for each in (COPIERS[how](svi), svi):
        with pytest.raises(
            ValueError, match=r"AutoNormal: expected an autoguide with its model.*run it once"
        ):
            each.step(data())
