"""A second thread that runs a pair gets an error at once, and changes nothing."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.nn import PyroModule
from pyro.poutine.runtime import _PYRO_STACK
from registry import data, pair

import pyro_vae as pv


def adam():
    return pyro.optim.Adam({"lr": 1e-2})


def compiled():
    return pv.CompiledELBO(Trace_ELBO(), backend="eager")


class Waiting(PyroModule):
    """A model that waits inside its plate, where it has a handler on Pyro's stack."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.inside, self.go_on = threading.Event(), threading.Event()

    def forward(self, x):
        with pyro.plate("outer", 1):
            self.inside.set()
            assert self.go_on.wait(60)
        return self.model(x)


def surroundings():
    """What belongs to the whole process."""
    return (
        list(_PYRO_STACK),
        dict(pyro.get_param_store().items()),
        pyro.settings.get("validate_distributions_pyro"),
        torch.distributions.Distribution._validate_args,
        torch._C._get_tracing_state,
        torch.is_grad_enabled(),
    )


def trained(svi):
    """Parameters, and the gradients of the last step."""
    each = [t for p in pv.parameters(svi.model, svi.guide) for t in (p, p.grad)]
    return [t.detach() for t in each if t is not None]


def stepping(loss):
    def make():
        svi = pv.SVI(*pair(), adam(), loss=loss())
        svi.step(data())  # from now on a step checks nothing, and a compiled one runs no handler
        return svi, lambda: svi.step(data())

    return make


def using(tool):
    def make():
        svi = pv.SVI(*pair(), adam(), loss=Trace_ELBO())
        return svi, lambda: tool(svi, data())

    return make


SECOND = {
    "a step": stepping(Trace_ELBO),
    "a compiled step": stepping(compiled),
    "the first step": using(lambda svi, x: svi.step(x)),
    "evaluate_loss": using(lambda svi, x: svi.evaluate_loss(x)),
    "fit": using(lambda svi, x: list(pv.fit(svi, [x], 1, progress=False))),
    "elbo_terms": using(lambda svi, x: pv.elbo_terms(svi.model, svi.guide, x)),
    "log_evidence": using(lambda svi, x: pv.log_evidence(svi.model, svi.guide, x, 5)),
    "generate": using(lambda svi, x: pv.generate(svi.model, x)),
    "explain": using(lambda svi, x: pv.explain(svi.model, svi.guide, Trace_ELBO(), x)),
    "scale_latents": using(lambda svi, x: pv.scale_latents(0.5).__enter__()),
    "the loss of a CompiledELBO": using(lambda svi, x: compiled().loss(svi.model, svi.guide, x)),
}
FIRST = {"eager": Trace_ELBO, "compiled": compiled}


@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("second", SECOND)
def test_a_second_thread_is_refused_and_changes_nothing(first, second):
    model, guide = pair()
    waiting = Waiting(model)
    svi = pv.SVI(waiting, guide, adam(), loss=FIRST[first]())
    other, run = SECOND[second]()
    before = surroundings()
    with ThreadPoolExecutor(1) as thread:
        step = thread.submit(svi.step, data())
        assert waiting.inside.wait(60)
        inside = surroundings()
        state = [t.clone() for t in trained(other)]
        try:
            with pytest.raises(RuntimeError, match="one thread at a time.*To fix: use processes,"):
                run()
            assert surroundings() == inside
        finally:
            waiting.go_on.set()
        step.result()
        assert all(torch.equal(t, u) for t, u in zip(state, trained(other), strict=True))
        assert surroundings() == before
        # One after the other: from either thread.
        other.step(data())
        thread.submit(svi.step, data()).result()
        svi.step(data())
        assert surroundings() == before


def test_no_thread_steps_inside_the_kl_weight_of_another():
    svi = pv.SVI(*pair(), adam(), loss=Trace_ELBO())
    with ThreadPoolExecutor(1) as thread:
        with pv.scale_latents(0.5):
            with pytest.raises(RuntimeError, match="one thread at a time"):
                thread.submit(svi.step, data()).result()
            with pv.scale_latents(0.5):
                svi.step(data())
        thread.submit(svi.step, data()).result()


def test_after_an_error_another_thread_may_run():
    svi = pv.SVI(*pair(), adam(), loss=Trace_ELBO())
    weight = pv.scale_latents(0.5)
    with ThreadPoolExecutor(1) as thread:
        with pytest.raises(ValueError, match="NaN"), weight:
            svi.step(data() * torch.nan)
        with weight, pytest.raises(ValueError, match="twice"):
            weight.__enter__()
        thread.submit(svi.step, data()).result()
