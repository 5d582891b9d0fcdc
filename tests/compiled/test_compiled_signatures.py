"""When a new graph is captured, when it is compiled, and what one graph serves."""

import copy
import random
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from compiled_steps import (
    Ignoring,
    Normed,
    Targeted,
    adam,
    assert_same_training,
    compiles,
    loss_of,
    replayed,
    weighted_pair,
)
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.nn import PyroModule
from registry import data, pair
from torch import nn

import pyro_vae as pv


def test_a_smaller_last_batch_has_its_own_graph():
    x = data(size=20)
    assert_same_training(pair(), Trace_ELBO(), 3 * [x[:8], x[8:16], x[16:]])


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
    compiled = pv.SVI(*twins, adam(), loss=replayed(Trace_ELBO()))
    for scale in (1.0, 3.0, torch.tensor(0.5), torch.tensor(4.0)):
        results = []
        for svi in (eager, compiled):
            torch.manual_seed(0)  # of the batch, and of the step
            results.append(svi.step(data(), torch.tensor(1.0), scale=scale))
        assert results[0] == pytest.approx(results[1], rel=1e-5)


def test_numbers_of_different_kinds_have_their_own_graphs():
    programs, elbo = weighted_pair(), replayed(Trace_ELBO())
    for _ in range(2):
        for weight in (1, True, 1.0):
            elbo.loss(*programs, data(), weight)
    assert elbo.num_graphs == 3


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


def test_train_and_eval_mode_have_their_own_graphs():
    programs = pair()[0], Normed()
    svi = pv.SVI(*programs, adam(), loss=replayed(Trace_ELBO()))
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
    svi = pv.SVI(*programs, adam(0.0), loss=replayed(Trace_ELBO()))
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
    svi = pv.SVI(*programs, adam(0.0), loss=replayed(Trace_ELBO()))
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


def test_a_gpu_s_precision_has_its_own_graph(monkeypatch):
    """Of full precision there is one graph, whether that was never set ("none") or is set again ("ieee")."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    programs = pair()
    elbo = pv.CompiledELBO(Trace_ELBO(), backend="eager")
    for precision in ("none", "tf32", "ieee", "tf32", "none"):
        monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision=precision))
        elbo.loss(*programs, data())
    older = SimpleNamespace(allow_tf32=True)  # torch before 2.9
    monkeypatch.setattr(torch.backends.cuda, "matmul", older)
    elbo.loss(*programs, data())
    assert elbo.num_graphs == 2


def test_handlers_with_other_contents_have_their_own_graphs():
    x, y = torch.randn(2, 4, 2)
    pair, elbo = Targeted(x), replayed(Trace_ELBO())
    for value in (x, y, x):
        with poutine.condition(data={"y": value}):
            assert loss_of(elbo, pair, x, y) == pytest.approx(loss_of(Trace_ELBO(), pair, x, y), rel=1e-5)
    assert elbo.num_graphs == 2


def test_loaded_and_frozen_parameters_are_seen():
    programs = pair()
    other = [copy.deepcopy(module.state_dict()) for module in pair()]
    svi = pv.SVI(*programs, adam(), loss=replayed(Trace_ELBO()))
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
    for elbo in (Trace_ELBO(), replayed(Trace_ELBO())):
        model, guide = copy.deepcopy(programs)
        svi = pv.SVI(model, guide, adam(), loss=elbo)
        torch.manual_seed(1)
        svi.step(x)
        model.decoder[0][1] = nn.Tanh()
        results.append([svi.step(x) for _ in range(3)])
    assert results[1] == pytest.approx(results[0], rel=1e-6)


class Buffered(PyroModule):
    """A guide that adds a buffer of zeros."""

    def __init__(self, program):
        super().__init__()
        self.program = program
        self.register_buffer("zeros", torch.zeros(8, 6))

    def forward(self, x):
        return self.program(x + self.zeros)


@compiles
@pytest.mark.parametrize("what", ["program.encoder.0.0.weight", "zeros"])
def test_a_parameter_or_a_buffer_may_change_its_strides(what):
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


def test_a_second_pair_has_its_own_graphs():
    elbo = replayed(Trace_ELBO())
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


def test_a_plain_module_is_captured_once():
    """SVI gives an ELBO a program that makes parameter statements: the same at every step."""

    class Plain(nn.Module):
        def __init__(self, program):
            super().__init__()
            self.program = program

        def forward(self, x):
            return self.program(x)

    elbo = replayed(Trace_ELBO())
    svi = pv.SVI(*map(Plain, pair()), adam(), loss=elbo)
    for _ in range(3):
        svi.step(data())
    assert elbo.num_graphs == 1


def test_many_graphs_give_one_warning():
    def program(number):
        pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))

    elbo = replayed(Trace_ELBO())
    for number in range(49):
        elbo.loss(program, program, number)
    with pytest.warns(UserWarning, match="captured 50 graphs.*Pass numbers as tensors"):
        elbo.loss(program, program, 49)
    elbo.loss(program, program, 50)


def test_each_gradient_is_compiled_at_once_and_no_loss_alone(monkeypatch):
    compiled = []

    def compile_nothing(graph, inputs, options):
        compiled.append(graph)
        return graph

    monkeypatch.setattr(torch._inductor, "compile", compile_nothing)
    svi = pv.SVI(*pair(), adam(), loss=pv.CompiledELBO(Trace_ELBO()))
    x = data(size=12)
    svi.evaluate_loss(x)
    assert not compiled
    for _ in range(3):
        svi.step(x)
        assert len(compiled) == 1
    for _ in range(3):
        svi.step(x[:5])
        assert len(compiled) == 2


@pytest.mark.proofs
@compiles
def test_a_step_has_the_same_bits_after_any_history():
    """A resumed training goes on as it would have."""
    start, x = pair(), data(size=12)
    found = []
    for history in (0, 25):
        model, guide = copy.deepcopy(start)
        svi = pv.SVI(model, guide, adam(), loss=pv.CompiledELBO(Trace_ELBO()))
        for step in range(history):
            svi.step(x if step % 2 else x[:5])
            svi.evaluate_loss(x)
        for module, before in zip((model, guide), start, strict=True):
            module.load_state_dict(before.state_dict())
        fresh = pv.SVI(model, guide, adam(), loss=svi.loss)
        torch.manual_seed(0)
        losses = [fresh.step(x[:5]), fresh.step(x), fresh.evaluate_loss(x)]
        found.append((losses, [p.detach().clone() for p in pv.parameters(model, guide)]))
    for losses, parameters in found[1:]:
        assert losses == found[0][0]
        torch.testing.assert_close(parameters, found[0][1], rtol=0, atol=0)


def test_each_number_of_threads_has_its_own_graph():
    """A compiled loop keeps the number of threads that it was compiled for."""
    before, programs, elbo = torch.get_num_threads(), pair(), replayed(Trace_ELBO())
    try:
        for number in (1, 2, 1):
            torch.set_num_threads(number)
            elbo.loss(*programs, data())
    finally:
        torch.set_num_threads(before)
    assert elbo.num_graphs == 2


def test_deterministic_operations_have_their_own_graph():
    programs, elbo = pair(), replayed(Trace_ELBO())
    try:
        for deterministic in (False, True, False):
            torch.use_deterministic_algorithms(deterministic)
            elbo.loss(*programs, data())
    finally:
        torch.use_deterministic_algorithms(False)
    assert elbo.num_graphs == 2
