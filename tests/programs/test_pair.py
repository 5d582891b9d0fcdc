"""Pair: its modules and parameters, its signature, and how it restores what a run has moved."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from registry import data, pair
from torch import nn

import pyro_vae as pv
from pyro_vae.programs import Pair, no_guide

# Modules and parameters.


def test_modules_and_parameters_are_those_of_torch_each_module_once():
    shared = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    first = nn.Sequential(shared, nn.Sequential(nn.Linear(3, 1)))
    second = nn.Sequential(nn.Linear(2, 2), shared)
    found = Pair(first, second.forward).modules
    assert found == list(nn.ModuleList([first, second]).modules())[1:]
    expected = list(nn.ModuleList([first, second]).parameters())
    assert list(map(id, pv.parameters(first, second))) == list(map(id, expected))


def test_a_parameter_that_two_modules_share_is_trained_once():
    model, guide = nn.Linear(2, 3), nn.Linear(2, 3, bias=False)
    guide.weight = model.weight
    assert list(map(id, pv.parameters(model, guide))) == [id(model.weight), id(model.bias)]


def test_frozen_parameters_are_parameters_that_do_not_train():
    model, guide = nn.Linear(2, 3), nn.Linear(3, 2)
    model.weight.requires_grad_(False)
    found = Pair(model, guide)
    assert list(map(id, found.parameters)) == list(map(id, (*model.parameters(), *guide.parameters())))
    assert list(map(id, found.trainable)) == [id(model.bias), id(guide.weight), id(guide.bias)]


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_parameters_that_a_lazy_module_has_not_made_yet_are_listed():
    assert len(Pair(nn.LazyLinear(5), no_guide).parameters) == 2


def test_buffers_are_listed_with_their_modules_and_names():
    norm = nn.BatchNorm1d(4)
    found = [(module, name) for module, name, _ in Pair(nn.Sequential(nn.Linear(2, 4), norm), norm).buffers]
    assert found == [(norm, "running_mean"), (norm, "running_var"), (norm, "num_batches_tracked")]


# The signature.


def signature(network, *args, exact=True):
    return Pair(network, no_guide, args).signature(exact=exact)


def test_a_parameter_that_becomes_a_buffer_changes_the_signature():
    net = nn.Linear(2, 3, bias=False)
    before = signature(net)
    weight = net.weight
    del net.weight
    net.register_buffer("weight", weight)
    assert signature(net) != before


def test_the_signature_changes_with_all_that_a_graph_depends_on():
    network = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.BatchNorm1d(3))
    signatures = [signature(network)]
    for change in (
        lambda: network[0].double(),  # the parameters are the same objects
        lambda: network[0].requires_grad_(False),
        lambda: network[2].eval(),
        lambda: setattr(network, "1", nn.Tanh()),
        lambda: setattr(network[2], "running_mean", torch.ones(3)),
    ):
        change()
        signatures.append(signature(network))
    assert all(signatures[i] != signatures[j] for i in range(len(signatures)) for j in range(i))
    assert signature(network) == signatures[-1]


def test_the_signature_holds_the_form_of_tensors_and_the_values_of_all_else():
    network = nn.Linear(2, 3)
    x = torch.zeros(4, 2)
    for exact in (False, True):
        own = signature(network, x, "mean", exact=exact)
        assert own == signature(network, torch.ones(4, 2), "mean", exact=exact)
        for others in ((x[:3], "mean"), (x.double(), "mean"), (x, "sum"), ([x], "mean"), (x,)):
            assert own != signature(network, *others, exact=exact)


def test_only_an_exact_signature_tells_floats_and_buffers_apart():
    network = nn.BatchNorm1d(3)
    before = {exact: signature(network, 0.5, exact=exact) for exact in (False, True)}
    assert signature(network, 0.7, exact=False) == before[False] == signature(network, 0.5, exact=False)
    assert signature(network, 0.7, exact=True) != before[True] == signature(network, 0.5, exact=True)
    assert signature(network, 1, exact=False) != before[False]
    network.running_mean = torch.ones(3)
    assert signature(network, 0.5, exact=False) == before[False]
    assert signature(network, 0.5, exact=True) != before[True]


# Leaving everything as it was.


class Normed(PyroModule):
    """A guide with BatchNorm, of which one part has a mode of its own."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 4), pv.DiagNormal())
        self.net[1].eval()

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.net(x))


def state_of(pair):
    buffers = [buffer.clone() for _, _, buffer in pair.buffers]
    return buffers, [module.training for module in pair.modules]


def test_a_snapshot_restores_buffers_modes_and_random_state():
    model, guide = pair()[0], Normed()
    run = Pair(model, guide, (data(),))
    expected, norm = copy.deepcopy(state_of(run)), guide.net[0]
    random_state, mean = torch.get_rng_state(), norm.running_mean
    before = run.snapshot()
    assert not before.random_state_moved()
    run.trace()
    assert before.random_state_moved()
    norm.running_mean = torch.ones(6)  # a new tensor in place of the buffer
    guide.eval()
    before.restore()
    torch.testing.assert_close(state_of(run), expected, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert norm.running_mean is mean
    torch.rand(())
    moved = torch.get_rng_state()
    before.restore(random_state=False)
    assert torch.equal(torch.get_rng_state(), moved)


@pytest.mark.parametrize("error", [False, True])
@pytest.mark.parametrize("context", ["trial", "evaluating"])
def test_a_trial_and_an_evaluation_leave_the_modules_as_they_were(context, error):
    model, guide = pair()[0], Normed()
    run = Pair(model, guide, (data(),))
    expected, random_state = copy.deepcopy(state_of(run)), torch.get_rng_state()
    try:
        with getattr(run, context)():
            assert not torch.is_grad_enabled()
            assert guide.training == (context == "trial")
            run.trace()
            guide.net[0].running_mean.fill_(7.0)
            if error:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert torch.is_grad_enabled()
    torch.testing.assert_close(state_of(run), expected, rtol=0, atol=0)
    # A trial draws nothing, for all that can be seen from outside. An evaluation does, unless it fails.
    assert torch.equal(torch.get_rng_state(), random_state) == (context == "trial" or error)


# Running it.


def test_the_model_runs_on_the_draws_of_the_guide():
    model, guide = pair()
    x = data()
    torch.manual_seed(3)
    of_model, of_guide = Pair(model, guide, (x,)).trace()
    torch.manual_seed(3)
    z = guide.encoder(x).rsample()
    torch.testing.assert_close(of_guide.nodes["z"]["value"], z)
    assert of_model.nodes["z"]["value"] is of_guide.nodes["z"]["value"]
    elbo = of_model.log_prob_sum() - of_guide.log_prob_sum()
    exact = model.decoder(z).log_prob(x) + dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    torch.testing.assert_close(elbo, (exact - guide.encoder(x).log_prob(z)).sum())


def test_with_copies_of_the_draws_only_the_model_depends_on_them():
    model, guide = pair()
    traces = Pair(model, guide, (data(),)).trace(copy_draws=True)
    p, q = (trace.nodes["z"]["value"] for trace in traces)
    assert torch.equal(p, q)
    (through_model,) = torch.autograd.grad(traces.model.log_prob_sum(), p, retain_graph=True)
    assert through_model.any()
    assert torch.autograd.grad(traces.guide.log_prob_sum(), p, allow_unused=True) == (None,)


def test_a_pair_runs_on_its_own_parameters_and_leaves_pyro_s_store_alone():
    model, guide = pair()
    pyro.param("other", torch.tensor(2.0))
    run = Pair(model, guide, (data(),))
    with run.isolated(validate=True):
        run.trace()
        assert "other" not in pyro.get_param_store()
    assert list(pyro.get_param_store().keys()) == ["other"]
