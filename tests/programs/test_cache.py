"""PairCache: results live as long as their pair, are found again by it, and are not copied with an ELBO."""

import copy
import gc
import pickle
import weakref

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from registry import data, pair
from torch import nn

import pyro_vae as pv
from pyro_vae.programs import Pair, PairCache, no_guide


def compiled(elbo=None):
    return pv.CompiledELBO(elbo or Trace_ELBO(), backend="eager")


# objective, and the number of pairs that share it: a capture takes longer than a look for the layout
SHARED = {"IWAE": (lambda: pv.IWAE(3), 20), "CompiledELBO": (compiled, 5)}


def take_step(model, guide, elbo):
    return pv.SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), loss=elbo).step(data())


# How long results live.


@pytest.mark.parametrize("name", SHARED)
def test_a_shared_objective_keeps_no_pair_alive(name):
    make, count = SHARED[name]
    elbo, models, guides = make(), [], []
    for _ in range(count):
        model, guide = pair()
        take_step(model, guide, elbo)
        models.append(weakref.ref(model))
        guides.append(weakref.ref(guide))
        del model, guide
    gc.collect()
    assert sum(ref() is not None for ref in models) == 0
    assert sum(ref() is not None for ref in guides) == 0
    take_step(*pair(), elbo)


def test_results_go_with_the_model_or_with_the_guide():
    for kept in (0, 1):
        cache, programs = PairCache(), list(pair())
        result = nn.Linear(1, 1)
        cache.results(Pair(*programs))["key"] = result
        assert cache.results(Pair(*programs)) == {"key": result}
        alive = weakref.ref(result)
        programs[1 - kept] = None
        del result
        gc.collect()
        assert alive() is None


def test_results_of_one_pair_are_not_those_of_another():
    cache, (model, guide), (other_model, other_guide) = PairCache(), pair(), pair()
    cache.results(Pair(model, guide))["key"] = 1
    for others in ((other_model, guide), (model, other_guide), (guide, model), (model, no_guide)):
        assert cache.results(Pair(*others)) == {}


# What a pair is found again by.


class VAE(nn.Module):
    """Model and guide as two methods of one module, which are new objects at every access."""

    def __init__(self):
        super().__init__()
        self.programs = nn.ModuleList(pair())
        self.runs = 0

    def model(self, x):
        self.runs += 1
        return self.programs[0](x)

    def guide(self, x):
        return self.programs[1](x)

    def wide_guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2), 3.0).to_event(1))


def test_methods_of_one_module_are_captured_once():
    vae, elbo = VAE(), compiled()
    for _ in range(4):
        take_step(vae.model, vae.guide, elbo)
    assert elbo.num_graphs == 1


def test_another_method_of_the_same_module_has_results_of_its_own():
    vae, elbo, x = VAE(), compiled(), data()
    for guide in (vae.guide, vae.wide_guide, vae.guide):
        losses = []
        for each in (elbo, Trace_ELBO()):
            torch.manual_seed(0)
            losses.append(each.loss(vae.model, guide, x))
        assert losses[0] == pytest.approx(losses[1])
    assert elbo.num_graphs == 2


def test_the_layout_of_methods_of_one_module_is_found_once():
    vae, elbo = VAE(), pv.IWAE(3)
    runs = []
    for _ in range(4):
        before = vae.runs
        elbo.loss(vae.model, vae.guide, data())
        runs.append(vae.runs - before)
    assert runs[0] > 1
    assert runs[1:] == [1, 1, 1]


def test_a_program_without_weak_references_is_computed_each_time():
    class Slotted:
        __slots__ = ("program",)

        def __call__(self, x):
            return self.program(x)

    model, guide = pair()
    slotted = Slotted()
    slotted.program = model
    elbo = pv.IWAE(3)
    for _ in range(3):
        torch.manual_seed(0)
        found = elbo.loss(slotted, guide, data())
    torch.manual_seed(0)
    assert found == elbo.loss(model, guide, data())


# Copies.


def by_pickle(value):
    return pickle.loads(pickle.dumps(value))


duplicates = pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle], ids=["deepcopy", "pickle"])


@duplicates
def test_a_copy_of_a_compiled_elbo_captures_again_and_has_the_same_loss(duplicate):
    model, guide = pair()
    x = data()
    svi = pv.SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), loss=compiled())
    svi.step(x)
    losses, captured = [], []
    for elbo in (svi.loss, duplicate(svi.loss)):
        before = elbo.num_graphs
        torch.manual_seed(0)
        optimizer = torch.optim.SGD(pv.parameters(model, guide), lr=0.0)
        losses.append(pv.SVI(model, guide, optimizer, loss=elbo).step(x))
        captured.append(elbo.num_graphs - before)
    assert losses[0] == losses[1]
    assert captured == [0, 1]


@duplicates
def test_a_copy_of_an_iwae_finds_the_layout_again_and_has_the_same_loss(duplicate):
    vae = VAE()
    x = data()
    svi = pv.SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-2}), loss=pv.IWAE(3))
    svi.step(x)
    losses, runs = [], []
    for elbo in (svi.loss, duplicate(svi.loss)):
        before = vae.runs
        torch.manual_seed(0)
        losses.append(elbo.loss(vae.model, vae.guide, x))
        runs.append(vae.runs - before)
    assert losses[0] == losses[1]
    assert runs[0] == 1 < runs[1]


@pytest.mark.parametrize("make", [lambda: pv.IWAE(3), compiled], ids=["IWAE", "CompiledELBO"])
def test_a_copy_of_an_svi_trains_its_own_pair(make):
    svi = pv.SVI(*pair(), pyro.optim.Adam({"lr": 1e-2}), loss=make())
    x = data()
    svi.step(x)
    twin = copy.deepcopy(svi)
    before = copy.deepcopy(svi.model.state_dict())
    losses = []
    for each in (twin, svi):
        torch.manual_seed(0)
        losses.append([each.step(x) for _ in range(3)])
        if each is twin:
            torch.testing.assert_close(dict(svi.model.state_dict()), dict(before), rtol=0, atol=0)
    assert losses[0] == losses[1]
    torch.testing.assert_close(dict(twin.model.state_dict()), dict(svi.model.state_dict()), rtol=0, atol=0)


# What is frozen, thawed or replaced is seen at the next step, though the objective has seen the pair before.


FROZEN = {
    "IWAE": lambda: pv.IWAE(3),
    "MeanField": lambda: pv.MeanField(3),
    "CompiledELBO": compiled,
    "CompiledELBO of IWAE": lambda: compiled(pv.IWAE(3)),
}


def moved_by_a_step(svi):
    """Take a step; return whether it trained the encoder, and the decoder."""
    parts = svi.guide.encoder, svi.model.decoder
    before = [[p.detach().clone() for p in part.parameters()] for part in parts]
    svi.step(data())
    moved = []
    for part, olds in zip(parts, before, strict=True):
        (changed,) = {not torch.equal(old, p) for old, p in zip(olds, part.parameters(), strict=True)}
        moved.append(changed)
    return moved


def assert_sees(elbo, fresh, model, guide, x):
    """Check that an objective which knows the pair gives the loss of a fresh one, for the same noise."""
    losses = []
    for each in (elbo, fresh):
        torch.manual_seed(0)
        losses.append(each.loss(model, guide, x))
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.proofs if name == "CompiledELBO of IWAE" else ())
        for name in FROZEN
    ],
)
def test_a_frozen_thawed_or_replaced_module_is_seen_at_the_next_step(name):
    elbo, x = FROZEN[name](), data()
    svi, other = (pv.SVI(*pair(), pyro.optim.Adam({"lr": 1e-2}), loss=elbo) for _ in range(2))
    for _ in range(2):
        svi.guide.encoder.requires_grad_(False)
        assert moved_by_a_step(svi) == [False, True]
        svi.guide.encoder.requires_grad_(True)
        svi.model.decoder.requires_grad_(False)
        assert moved_by_a_step(svi) == [True, False]
        svi.model.decoder.requires_grad_(True)
        assert moved_by_a_step(svi) == [True, True]
        assert moved_by_a_step(other) == [True, True]
        svi.model.decoder, svi.guide.encoder[0] = pair()[0].decoder, pv.MLP(6, 7, 4)
        assert_sees(elbo, FROZEN[name](), svi.model, svi.guide, x)
        assert moved_by_a_step(svi) == [True, True]
        layer = svi.model.decoder[0][0]
        layer.weight = nn.Parameter(layer.weight.detach() + 1)
        assert_sees(elbo, FROZEN[name](), svi.model, svi.guide, x)
        assert moved_by_a_step(svi) == [True, True]


def test_a_module_in_train_and_in_eval_mode_is_captured_twice():
    model, guide = pair()
    guide.encoder.insert(0, nn.Dropout(0.9))
    elbo, x = compiled(), data()
    for training in (True, False, True):
        guide.train(training)
        losses = []
        for each in (elbo, Trace_ELBO()):
            torch.manual_seed(0)
            losses.append(each.loss(model, guide, x))
        assert losses[0] == pytest.approx(losses[1])
    assert elbo.num_graphs == 2
