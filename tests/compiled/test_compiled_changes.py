"""Compiled steps see what changes, as eager steps do, or refuse it: hooks, attributes, gradients."""

import argparse
import copy
import types
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import pytest
import torch
from compiled_steps import adam, compiles, replayed
from pyro.infer import Trace_ELBO, TraceGraph_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from registry import data, each_once, pair
from torch import nn
from torch.nn.utils import prune, spectral_norm, weight_norm

import pyro_vae as pv


def clip(gradient):
    return gradient.clamp(-1e-3, 1e-3)


def halve_in_place(p):
    p.grad.mul_(0.5)


def watch(seen):
    return lambda gradient: seen.append(gradient.norm().item())


HOOKS = {
    "clip": lambda params, seen: [p.register_hook(clip) for p in params],
    "freeze": lambda params, seen: params[0].register_hook(torch.zeros_like),
    "watch": lambda params, seen: [p.register_hook(watch(seen)) for p in params],
    "post-accumulate": lambda params, seen: [
        p.register_post_accumulate_grad_hook(halve_in_place) for p in params[:2]
    ],
    "all at once": lambda params, seen: torch.autograd.graph.register_multi_grad_hook(
        params, lambda gradients: seen.append(sum(g.norm().item() for g in gradients))
    ),
}

ROUTES = {
    "pyro_vae.SVI": (pv.SVI, Trace_ELBO),
    "by loss_and_grads": (pv.SVI, TraceGraph_ELBO),
    "pyro.infer.SVI": (pyro.infer.SVI, Trace_ELBO),
}


@pytest.mark.parametrize(
    ("hook", "late", "route"),
    each_once(HOOKS, [False, True], ROUTES),
)
def test_hooks_on_parameters_run_as_in_eager_steps(hook, late, route):
    register, (svi_class, elbo) = HOOKS[hook], ROUTES[route]
    results = []
    programs = pair()
    for loss in (elbo(), replayed(elbo())):
        pyro.clear_param_store()
        model, guide = copy.deepcopy(programs)
        params, seen = pv.parameters(model, guide), []
        svi = svi_class(model, guide, pyro.optim.SGD({"lr": 1e-2}), loss=loss)
        torch.manual_seed(0)
        if late:
            svi.step(data())
        register(params, seen)
        losses = [svi.step(data()) for _ in range(3)]
        results.append((losses, sorted(seen), [p.detach() for p in params]))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)


@compiles
def test_hooks_run_on_the_gradients_of_a_compiled_graph():
    model, guide = pair()
    elbo, seen = pv.CompiledELBO(Trace_ELBO()), []
    params = pv.parameters(model, guide)
    HOOKS["clip"](params, seen)
    HOOKS["watch"](params, seen)
    svi = pv.SVI(model, guide, adam(), loss=elbo)
    for step in (1, 2):
        svi.step(data())
        assert len(seen) == step * len(params)
        assert all(p.grad.abs().max() <= 1e-3 for p in params)


def test_a_gradient_that_a_hook_breaks_stops_a_compiled_step():
    model, guide = pair()
    svi = pv.SVI(model, guide, adam(), loss=replayed(Trace_ELBO()))
    svi.step(data())
    hook = pv.parameters(model, guide)[0].register_hook(lambda gradient: gradient * torch.nan)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="A gradient is not finite"):
        svi.step(data())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    hook.remove()
    svi.step(data())


def test_a_gradient_that_a_hook_repairs_does_not():
    """As in an eager step, what counts is the gradient that the optimiser gets."""
    model, guide = pair()
    shift = model.prior.shift = nn.Parameter(torch.zeros(2))
    model.prior.forward = lambda: dist.Normal(0.0, 1 + (shift * shift).sqrt()).to_event(1)  # slope NaN at 0
    for loss in (Trace_ELBO(), replayed(Trace_ELBO())):
        svi = pv.SVI(model, guide, adam(0.0), loss=loss)
        with pytest.raises(ValueError, match="A gradient is not finite"):
            svi.step(data())
        hook = shift.register_hook(torch.nan_to_num)
        svi.step(data())
        assert torch.equal(shift.grad, torch.zeros(2))
        hook.remove()


MODULE_HOOKS = [
    "register_forward_pre_hook",
    "register_forward_hook",
    "register_full_backward_pre_hook",
    "register_full_backward_hook",
]


@pytest.mark.filterwarnings("ignore:For backward hooks to be called")
@pytest.mark.parametrize("method", MODULE_HOOKS)
@pytest.mark.parametrize("on_all", [False, True], ids=["on one module", "on all"])
def test_hooks_on_modules_are_refused(method, on_all):
    """A graph would run them while it is captured and never again."""
    model, guide = pair()
    svi = pv.SVI(model, guide, adam(), loss=replayed(Trace_ELBO()))

    def peek(*args):
        pass

    for _ in range(2):  # before the first step and after it
        if on_all:
            name = method.replace("register_", "register_module_")
            hook, owner = getattr(nn.modules.module, name)(peek), "all modules"
        else:
            hook, owner = getattr(model.decoder[0], method)(peek), "MLP"
        try:
            with pytest.raises(ValueError, match=f"hooks on {owner}: expected none in a graph, got .*peek.*"):
                svi.step(data())
            with pytest.raises(ValueError, match="expected none in a graph"):
                pv.log_evidence(model, guide, data(), 4, compiled=True)
        finally:
            hook.remove()
        svi.step(data())


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: weight_norm(layer),
        lambda layer: spectral_norm(layer),
        lambda layer: prune.random_unstructured(layer, "weight", amount=0.3),
        lambda layer: nn.utils.parametrizations.weight_norm(layer),
    ],
    ids=["weight_norm", "spectral_norm", "prune", "parametrization"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_weights_that_torch_computes_are_captured_once(change):
    def make():
        model, guide = pair()
        change(guide.encoder[0][0])
        return model, guide

    assert_same_steps(make, lambda model: None, graphs=1)


@dataclass
class Settings:
    scale: float = 1.0


class Changeable(PyroModule):
    """A model that reads its attributes."""

    def __init__(self, network):
        super().__init__()
        self.network = network
        self.number = 1.0
        self.tensor = torch.tensor(1.0)
        self.activation = torch.tanh
        self.prior = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        self.held = {"numbers": [1.0, 1.0], "tensor": torch.tensor(1.0)}
        self.settings = Settings()
        self.namespace = types.SimpleNamespace(scale=1.0)
        self.options = argparse.Namespace(scale=1.0)
        self._private = 1.0

    def gain(self):
        return 1.0

    def forward(self, x):
        scale = self.number * self.tensor * self.held["numbers"][1] * self.held["tensor"]
        scale = (
            scale
            * self.gain()
            * self.settings.scale
            * self.namespace.scale
            * self.options.scale
            * self._private
        )
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior)
            logits = scale * self.activation(self.network(z))
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)


class Louder(Changeable):
    def gain(self):
        return 3.0


def changeable():
    network = nn.Sequential(
        nn.Linear(2, 5), nn.BatchNorm1d(5), nn.LeakyReLU(0.1), nn.Dropout(0.2), nn.Linear(5, 6)
    )
    return Changeable(network), pair()[1]


CHANGES = {
    "Dropout.p": lambda model: setattr(model.network[3], "p", 0.7),
    "BatchNorm.momentum": lambda model: setattr(model.network[1], "momentum", 0.9),
    "BatchNorm.eps": lambda model: setattr(model.network[1], "eps", 1.0),
    "negative_slope": lambda model: setattr(model.network[2], "negative_slope", -2.0),
    "a number": lambda model: setattr(model, "number", 3.0),
    "a private number": lambda model: setattr(model, "_private", 3.0),
    "a tensor": lambda model: setattr(model, "tensor", torch.tensor(3.0)),
    "a number in a list": lambda model: model.held["numbers"].__setitem__(1, 3.0),
    "a tensor in a dict": lambda model: model.held.update(tensor=torch.tensor(3.0)),
    "a number in a dataclass": lambda model: setattr(model.settings, "scale", 3.0),
    "a number in a namespace": lambda model: setattr(model.namespace, "scale", 3.0),
    "a number in argparse's": lambda model: setattr(model.options, "scale", 3.0),
    "a function": lambda model: setattr(model, "activation", torch.sin),
    "a distribution": lambda model: setattr(model, "prior", dist.Normal(torch.ones(2), 2.0).to_event(1)),
    "forward": lambda model: setattr(model.network[2], "forward", torch.sin),
    "the class": lambda model: setattr(model, "__class__", Louder),
}


class Sine(nn.LeakyReLU):
    def forward(self, x):
        return x.sin()


def assert_same_steps(make, change, graphs):
    """Steps before and after a change, and an eager run between them: as without a graph, from few graphs."""
    found = []
    for loss in (Trace_ELBO(), replayed(Trace_ELBO())):
        torch.manual_seed(0)
        model, guide = make()
        svi = pv.SVI(model, guide, pyro.optim.SGD({"lr": 1e-2}), loss=loss)
        losses = [svi.step(data(size=16)) for _ in range(2)]
        pv.elbo_terms(model, guide, data(size=11))
        change(model)
        losses += [svi.step(data(size=16)) for _ in range(3)]
        found.append((losses, model.state_dict(), guide.state_dict()))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    assert loss.num_graphs == graphs


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_attribute_is_used(change):
    assert_same_steps(changeable, change, graphs=2)


def test_a_changed_forward_of_a_class_is_used(monkeypatch):
    def make():
        monkeypatch.undo()
        return changeable()

    assert_same_steps(
        make, lambda model: monkeypatch.setattr(nn.LeakyReLU, "forward", Sine.forward), graphs=2
    )


def test_a_changed_elbo_is_used():
    found, programs = [], pair()
    for compile_it in (lambda elbo: elbo, replayed):
        elbo = Trace_ELBO()
        svi = pv.SVI(*programs, adam(0.0), loss=compile_it(elbo))
        svi.step(data())
        elbo.num_particles = 3
        torch.manual_seed(0)
        found.append(svi.step(data()))
    assert found[1] == pytest.approx(found[0], rel=1e-6)


def test_a_changed_weight_around_a_program_is_used():
    found, programs = [], pair()
    for elbo in (Trace_ELBO(), replayed(Trace_ELBO())):
        weights = [pv.scale_latents(0.5), pv.scale_latents(0.5)]
        model, guide = (weight(program) for weight, program in zip(weights, programs, strict=True))
        svi = pv.SVI(model, guide, adam(0.0), loss=elbo)
        svi.step(data())
        for weight in weights:
            weight.beta = 4.0
        torch.manual_seed(0)
        found.append(svi.step(data()))
    assert found[1] == pytest.approx(found[0], rel=1e-6)


def test_an_earlier_value_finds_its_graph_again():
    model, guide = changeable()
    elbo = replayed(Trace_ELBO())
    svi = pv.SVI(model, guide, adam(), loss=elbo)
    for p in (0.2, 0.5, 0.2, 0.5):
        model.network[3].p = p
        svi.step(data())
    assert elbo.num_graphs == 2


class Keeping(PyroModule):
    """A guide that counts its runs and keeps their results, which it does not read."""

    def __init__(self, guide):
        super().__init__()
        self.guide = guide
        self.runs, self.history, self.draw = 0, [], None

    def forward(self, x):
        self.runs += 1
        self.draw = self.guide(x)
        self.history.append(x.shape)


def test_what_a_run_keeps_for_itself_makes_no_new_graph():
    def make():
        model, guide = pair()
        return model, Keeping(guide)

    assert_same_steps(make, lambda model: None, graphs=1)


def test_an_autoguide_that_is_set_up_by_the_first_step_is_captured_once():
    model = pair()[0]
    guide, elbo = AutoNormal(model), replayed(Trace_ELBO())
    svi = pyro.infer.SVI(model, guide, adam(), loss=elbo)
    for _ in range(3):
        svi.step(data())
        guide.median()
    assert elbo.num_graphs == 1


class Reading(PyroModule):
    """A model that reads a tensor of its own into Python."""

    def __init__(self, read):
        super().__init__()
        self.read = read
        self.register_buffer("held", torch.tensor(1.0))
        self.register_buffer("index", torch.tensor(1))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            loc = z.sum(-1, keepdim=True) * self.read(self)
            pyro.sample("x", dist.Normal(loc.expand(-1, 6), 1.0).to_event(1), obs=x)


@pytest.mark.parametrize(
    "read",
    [
        lambda model: float(model.held),
        lambda model: int(model.held),
        lambda model: 2.0 if model.held else 3.0,
        lambda model: [2.0, 3.0][model.held.long()],
        lambda model: [2.0, 3.0][model.index],
        lambda model: torch.tensor([2.0, 3.0])[model.index],
        lambda model: torch.ones(model.index).sum(),
        lambda model: torch.ones(3)[: model.index].sum(),
        lambda model: torch.ones(3).narrow(0, 0, model.index).sum(),
        lambda model: torch.full(size=(model.index, 1), fill_value=2.0).sum(),
    ],
)
def test_a_read_of_a_tensor_that_the_pair_holds_is_refused(read):
    """A graph would keep the number."""
    with pytest.raises(ValueError, match="(?s)cannot capture: test_compiled_changes.py, line .*lambda model"):
        replayed(Trace_ELBO()).loss(Reading(read), pair("gaussian")[1], data("gaussian"))


def counted(model):
    model.index += 1
    return model.index.float()


@pytest.mark.parametrize(
    "use",
    [
        counted,
        lambda model: torch.tensor([2.0, 3.0, 4.0]).index_select(0, model.index.reshape(1)),
        lambda model: model.index * 2.0,
        lambda model: model.index.add_(1).float(),
        lambda model: torch.where(model.index > 1, 2.0, 3.0),
    ],
)
def test_a_whole_number_that_the_pair_holds_may_be_used_as_a_tensor(use):
    programs, elbo = (Reading(use), pair("gaussian")[1]), replayed(Trace_ELBO())
    for index in (0, 1, 0):
        found = []
        for each in (elbo, Trace_ELBO()):
            programs[0].index.fill_(index)
            torch.manual_seed(0)
            found.append(each.loss(*programs, data("gaussian")))
        assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert elbo.num_graphs == 1


def test_a_network_upstream_of_the_batch_trains_or_is_refused():
    x, (model, guide), network = data("gaussian"), pair("gaussian"), nn.Linear(6, 6)
    before = network.weight.clone()
    optim = torch.optim.SGD([*pv.parameters(model, guide), *network.parameters()], lr=1e-2)
    pv.SVI(model, guide, optim, loss=Trace_ELBO()).step(network(x))
    assert not torch.equal(network.weight, before)
    svi = pv.SVI(model, guide, optim, loss=replayed(Trace_ELBO()))
    for _ in range(2):  # at the first step, and after one of that shape
        with pytest.raises(ValueError, match=r"The batch: .* shape \(8, 6\) that requires.*or detach it"):
            svi.step(network(x))
        svi.step(network(x).detach())


@pytest.mark.parametrize("svi_class", [pv.SVI, pyro.infer.SVI], ids=["pyro_vae.SVI", "pyro.infer.SVI"])
def test_a_batch_that_requires_gradients_is_refused(svi_class):
    elbo, x = replayed(Trace_ELBO()), data("gaussian")
    svi = svi_class(*pair("gaussian"), adam(), loss=elbo)
    for _ in range(2):
        with pytest.raises(ValueError, match="The batch: .* that requires"):
            svi.step(x.requires_grad_())
        svi.step(x.detach())
    assert elbo.num_graphs == 1
    elbo.loss(*pair("gaussian"), x.requires_grad_())  # of which nobody asks for gradients


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True to a scalar")
def test_a_kl_weight_that_requires_gradients_is_refused():
    beta = torch.tensor(0.5)
    svi = pv.SVI(*pair(), adam(), loss=replayed(Trace_ELBO()))
    with pv.scale_latents(beta):
        svi.step(data())
        beta.requires_grad_()
        with pytest.raises(ValueError, match="The KL weight: .* that requires them"):
            svi.step(data())


def outside(model, scale):
    model.tensor = scale


def outside_in_a_list(model, scale):
    model.held["tensor"] = scale


@pytest.mark.parametrize("place", [outside, outside_in_a_list])
def test_an_attribute_that_requires_gradients_is_refused(place):
    """It is no parameter of the pair, but an optimiser may hold it or what it comes from."""
    model, guide = changeable()
    svi = pv.SVI(model, guide, adam(), loss=replayed(Trace_ELBO()))
    svi.step(data())
    scale = torch.tensor(2.0, requires_grad=True)
    place(model, scale)
    with pytest.raises(ValueError, match=r"The pair: .* shape \(\) that requires them"):
        svi.step(data())
    place(model, scale.exp())
    with pytest.raises(ValueError, match=r"The pair: .* shape \(\) that requires them"):
        svi.step(data())
    scale = scale.detach()
    place(model, scale)
    svi.step(data())
    scale.requires_grad_()
    with pytest.raises(ValueError, match=r"The pair: .* shape \(\) that requires them"):
        svi.step(data())
