"""A step that is interrupted or fails in its update: it is whole or not made at all, or the error says so."""

import copy
import os
import signal
import threading

import pytest
import torch
from pyro.infer import Trace_ELBO
from registry import data, pair

import pyro_vae as pv
from pyro_vae.interrupts import deferred


def make(optimizer=torch.optim.Adam, **options):
    model, guide = pair()
    return pv.SVI(model, guide, optimizer(pv.parameters(model, guide), lr=0.01, **options), loss=Trace_ELBO())


def state(svi):
    return copy.deepcopy([svi.model.state_dict(), svi.guide.state_dict(), svi.optimizer.state_dict()])


def press_ctrl_c(*_, **__):
    os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_in_the_update_waits_for_its_end():
    svi, other = make(), make()
    other.model.load_state_dict(svi.model.state_dict())
    other.guide.load_state_dict(svi.guide.state_dict())
    torch.manual_seed(0)
    other.step(data())
    svi.optimizer.register_step_pre_hook(press_ctrl_c)
    torch.manual_seed(0)
    with pytest.raises(KeyboardInterrupt):
        svi.step(data())
    torch.testing.assert_close(state(svi), state(other), rtol=0, atol=0)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_before_the_update_changes_nothing():
    svi, x = make(), data()
    svi.step(x)
    before, random_state = state(svi), torch.get_rng_state()
    svi.guide.register_forward_hook(press_ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        svi.step(x)
    torch.testing.assert_close(state(svi), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_handler_of_the_users_own_runs_after_the_update(monkeypatch):
    seen = []
    before = signal.signal(signal.SIGINT, lambda *_: seen.append(len(svi.optimizer.state)))
    try:
        svi = make()
        svi.optimizer.register_step_pre_hook(press_ctrl_c)
        svi.step(data())
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [8]  # with Adam's means of all parameters


@pytest.mark.parametrize("ignored", [False, True], ids=["in another thread", "Ctrl-C is ignored"])
def test_signals_are_left_alone(ignored):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN) if ignored else signal.getsignal(signal.SIGINT)
    seen = []

    def look():
        with deferred(signal.SIGINT):
            seen.append(signal.getsignal(signal.SIGINT))

    try:
        if ignored:
            look()
        else:
            thread = threading.Thread(target=look)
            thread.start()
            thread.join()
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [signal.SIG_IGN if ignored else before]


class HalfWay(torch.optim.SGD):
    """An optimiser that fails after its first parameter."""

    def step(self, closure=None):
        with torch.no_grad():
            self.param_groups[0]["params"][0].add_(1)
        raise ZeroDivisionError("at the second parameter")


def fail(*_):
    raise KeyError("a hook")


def test_an_optimiser_that_fails_midway_is_named():
    with pytest.raises(
        RuntimeError, match=r"HalfWay.step\(\).*ZeroDivisionError: at the.*last checkpoint"
    ) as e:
        make(HalfWay).step(data())
    assert isinstance(e.value.__cause__, ZeroDivisionError)
    svi = make()
    svi.optimizer.register_step_post_hook(fail)
    with pytest.raises(
        RuntimeError, match=r"Adam.step\(\) and the hooks on it to finish, got KeyError: 'a hook'"
    ):
        svi.step(data())


def test_an_interrupt_is_not_lost_where_the_update_fails():
    svi = make(HalfWay)
    svi.optimizer.register_step_pre_hook(press_ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        svi.step(data())


OPTIMISERS = {
    "Adam": (torch.optim.Adam, {}),
    "fused Adam": (torch.optim.Adam, {"fused": True}),
    "foreach Adam": (torch.optim.Adam, {"foreach": True}),
    "SGD": (torch.optim.SGD, {"momentum": 0.9}),
    "Adagrad": (torch.optim.Adagrad, {}),
}


@pytest.mark.parametrize(("optimizer", "options"), OPTIMISERS.values(), ids=OPTIMISERS)
def test_a_pair_that_becomes_double_in_mid_training_is_refused(optimizer, options):
    svi = make(optimizer, **options)
    svi.step(data())
    svi.model.double()
    svi.guide.double()
    before = state(svi)
    with pytest.raises(ValueError, match="optim: expected its .* in torch.float64 on cpu.*got torch.float32"):
        svi.step(data().double())
    torch.testing.assert_close(state(svi), before, rtol=0, atol=0)
    svi.optimizer.load_state_dict(svi.optimizer.state_dict())  # what the message says
    svi.step(data().double())
    means = [v for of_p in svi.optimizer.state.values() for v in of_p.values() if v.dim()]
    assert {v.dtype for v in means} == {torch.float64}
