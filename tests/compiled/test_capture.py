"""What is captured and stays live, what a capture leaves behind, and what is refused, in which words."""

import copy
import gc
import random

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from compiled_steps import ELBOS, Normed, Targeted, adam, loss_of, replayed
from pyro.infer import Trace_ELBO
from pyro.nn import PyroModule
from registry import data, pair

import pyro_vae as pv


@pytest.mark.parametrize("elbo", ["trace", "mean-field"])
def test_python_runs_at_the_first_step_only(elbo):
    model, guide = pair()
    calls, network = [], guide.encoder[0]
    network.forward = lambda x: calls.append(1) or type(network).forward(network, x)
    svi = pv.SVI(model, guide, adam(), loss=replayed(ELBOS[elbo]()))
    x = data()
    svi.step(x)
    at_first = len(calls)
    for _ in range(5):
        svi.step(x)
    assert len(calls) == at_first


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
        (branch, "cannot capture: test_capture.py, line .*sum.. > 0.*torch.where"),
        (read, "cannot capture: test_capture.py, line .*float.z.detach"),
        (array, "cannot capture: test_capture.py, line .*numpy reads a tensor into Python"),
        (coerced, "cannot capture: test_capture.py, line .*asarray.*reads a tensor into Python"),
        (listed, "cannot capture: test_capture.py, line .*tolist reads a tensor into Python"),
        (length, "shapes that do not depend on values, got .*cannot capture aten"),
        (selected, "shapes that do not depend on values, got .*cannot capture aten.masked_select"),
        (count, "expected it to repeat the pair, got numbers that are off.*counter"),
        (python_random, "expected it to repeat the pair, got numbers that are off.*Python or NumPy random"),
        (rebind, "buffer 'seen' of Odd: expected it updated in place, got a new tensor.*copy_"),
    ],
)
def test_what_cannot_be_captured_is_refused_by_its_line(odd, message):
    guide = pair("gaussian")[1]
    svi = pv.SVI(Odd(odd), guide, adam(), loss=replayed(Trace_ELBO()))
    with pytest.raises(ValueError, match=f"(?s){message}"):
        svi.step(data("gaussian"))


def test_a_changed_number_outside_of_the_pair_is_found_by_check():
    """A Python number that no module holds cannot be seen when it changes between steps."""
    shift = [0.0]
    model, guide = Odd(lambda model, z: shift[0]), pair("gaussian")[1]
    svi = pv.SVI(model, guide, adam(), loss=replayed(Trace_ELBO(), check=True))
    x = data("gaussian")
    for _ in range(3):
        svi.step(x)
    shift[0] = 5.0
    with pytest.raises(
        ValueError,
        match="expected it to repeat the pair, got numbers that are off.*attribute that is set again",
    ):
        svi.step(x)


class Record(dict):
    """A container that torch does not know."""


@pytest.mark.parametrize(
    ("wrap", "name"), [(torch.Tensor.numpy, "ndarray"), (lambda x: Record(x=x), "Record")]
)
def test_an_argument_that_a_graph_would_keep_is_refused(wrap, name):
    x = torch.randn(4, 2)
    with pytest.raises(
        ValueError, match=f"expected tensors.*got {name}, whose numbers a graph would keep.*torch.as_tensor"
    ):
        loss_of(replayed(Trace_ELBO()), Targeted(x), wrap(x), x)


def test_a_tensor_the_model_closes_over_stays_live():
    shift = torch.tensor(0.0)
    model, guide = Odd(lambda model, z: shift), pair("gaussian")[1]
    compiled = pv.SVI(model, guide, adam(0.0), loss=replayed(Trace_ELBO()))
    plain = pv.SVI(model, guide, adam(0.0), loss=Trace_ELBO())
    x = data("gaussian")
    for value in (0.0, 3.0, -7.0):
        shift.fill_(value)
        torch.manual_seed(0)
        expected = plain.step(x)
        torch.manual_seed(0)
        assert compiled.step(x) == pytest.approx(expected, rel=1e-6)


def test_one_tensor_given_twice_is_two_inputs():
    """And so is one that the pair holds: the next step may bring other tensors."""
    x, y, w = torch.randn(3, 4, 2)
    pair, elbo = Targeted(x), replayed(Trace_ELBO())
    for batch in ((x, x), (x, y), (y, x), (w, y)):
        assert loss_of(elbo, pair, *batch) == pytest.approx(loss_of(Trace_ELBO(), pair, *batch), rel=1e-5)


def test_an_operation_is_not_mistaken_for_torch_s_of_the_same_name():
    """A replayed graph calls torch.neg for aten.neg, but not for another library's."""
    library = torch.library.Library("another_library", "DEF")
    library.define("neg(Tensor x) -> Tensor", tags=(torch.Tag.pointwise,))
    library.impl("neg", lambda x: 2 * x, "CompositeExplicitAutograd")

    def odd(model, z):
        where = [None, torch.tensor([0, 2])]  # torch.index_put does not take the None
        chosen = torch.ops.aten.index_put(torch.zeros(len(z), 3), where, torch.ones(()))
        return torch.ops.another_library.neg(model.seen) + chosen.sum(-1, keepdim=True)

    model, guide, x = Odd(odd), pair("gaussian")[1], data("gaussian")
    model.seen.fill_(3.0)
    found = []
    for elbo in (Trace_ELBO(), replayed(Trace_ELBO())):
        torch.manual_seed(0)
        found.append(elbo.loss(model, guide, x))
    assert found[1] == pytest.approx(found[0], rel=1e-6)


def test_under_one_long_autocast_a_second_capture_is_checked_with_the_current_parameters():
    """The eager run of the check would find the parameters of an earlier step in autocast's cache."""
    model, guide = pair(width=64, hidden=40)
    x = data(width=64, size=32)
    elbo = replayed(Trace_ELBO())
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


def test_one_long_autocast_shows_the_current_parameters_between_captured_steps():
    model, guide = pair(width=64, hidden=40)
    svi = pv.SVI(model, guide, adam(0.05), loss=replayed(Trace_ELBO()))
    x = data(width=64)
    with torch.autocast("cpu", torch.bfloat16):
        svi.step(x)
        before = guide.encoder[0](x).detach()
        svi.step(x)
        assert not torch.equal(guide.encoder[0](x), before)


def test_nothing_is_left_behind_by_a_capture():
    """After the first step, buffers, gradients and random state are those after one eager step."""
    programs = pair()[0], Normed()
    x, left = data(size=16), []
    for elbo in (Trace_ELBO(), replayed(Trace_ELBO())):
        model, guide = copy.deepcopy(programs)
        torch.manual_seed(0)
        elbo.loss_and_grads(model, guide, x)
        gradients = [p.grad for p in pv.parameters(model, guide)]
        left.append((guide.state_dict(), gradients, torch.get_rng_state()))
    torch.testing.assert_close(*left)
    assert not torch._C._get_tracing_state()
    assert pyro.infer.util.is_validation_enabled()


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_is_as_before_a_capture(enabled):
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        replayed(Trace_ELBO()).loss(*pair(), data())
        assert gc.isenabled() == enabled
        with pytest.raises(ValueError, match="cannot capture"):
            replayed(Trace_ELBO()).loss(Odd(branch), pair()[1], data())
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()
