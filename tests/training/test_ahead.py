"""Steps ahead: a training that waits for no step is the training that waits for each, to the last bit."""

import pytest
import torch
from pyro.infer import Trace_ELBO
from registry import data, pair
from torch import nn

import pyro_vae as pv
from pyro_vae.svi import SVI
from pyro_vae.training import ahead

BATCHES = 25  # with a look at the device after ten steps, there are two in the middle of a pass


def normed():
    """BatchNorm has buffers, which move at every step."""
    model, _ = pair()
    network = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4), pv.DiagNormal())
    return model, pv.Guide(network)


def compiled():
    return pv.CompiledELBO(Trace_ELBO(), backend="eager")


def svi_of(programs, loss=None, make=torch.optim.Adam, **options):
    options = {"lr": 1e-2, "fused": True} | options
    return pv.SVI(*programs, make(pv.parameters(*programs), **options), loss=loss or compiled())


@pytest.fixture
def launched(monkeypatch):
    """Run ahead on the CPU too; the number of launched steps is the length of the list."""
    steps, launch = [], SVI._launch

    def counted(svi, skip, args):
        steps.append(args)
        return launch(svi, skip, args)

    monkeypatch.setattr(ahead, "DEVICE", "cpu")
    monkeypatch.setattr(ahead, "STEPS", 10)
    monkeypatch.setattr(SVI, "_launch", counted)
    return steps


def batches():
    torch.manual_seed(0)
    return list(data(size=4 * BATCHES).split(4))


class Noisy:
    """Batches in one piece of memory, which draw random numbers before each and at the end."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        batch = torch.empty_like(self.batches[0])
        for x in self.batches:
            yield batch.copy_(torch.bernoulli(0.2 + 0.6 * x))
        torch.rand(())


def trained(programs, read, epochs=2, lr=1e-2, **options):
    """Return the records or the error, and everything that a training changes."""
    svi = svi_of(programs, lr=lr)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(svi.optimizer, 0.99)
    records = []
    torch.manual_seed(1)
    try:
        for epoch in pv.fit(svi, read, epochs, scheduler=scheduler, **options):
            records.append(tuple(epoch)[:-1])  # without the seconds
    except ValueError as error:
        records.append(str(error))
    state = [programs[0].state_dict(), programs[1].state_dict(), svi.optimizer.state_dict()["state"]]
    return records, [state, torch.get_rng_state()]


@pytest.mark.parametrize(
    ("make", "bad"), [(pair, None), (normed, None), *((normed, bad) for bad in (1, 10, 11, 17, 24))]
)
def test_it_is_the_training_that_waits(make, bad, launched, monkeypatch):
    given = batches()
    if bad is not None:
        given[bad] = given[bad] * torch.nan
    found = []
    for device in ("cuda", "cpu"):
        monkeypatch.setattr(ahead, "DEVICE", device)
        torch.manual_seed(0)
        found.append(trained(make(), given if bad is not None else Noisy(given)))
    assert found[0][0] == found[1][0]
    assert len(launched) >= (BATCHES if bad is None else min(bad, 10))
    torch.testing.assert_close(found[0][1][0], found[1][1][0], rtol=0, atol=0)
    # After an error, the random state is that before the bad step.
    assert torch.equal(found[0][1][1], found[1][1][1])
    assert bad is None or "NaN" in found[0][0][-1]


@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_sum_that_overflows_is_no_bad_step(as_tensor, launched, monkeypatch):
    """Then the steps are taken again, each at its own learning rate, and the training goes on."""
    monkeypatch.setattr(
        "pyro_vae.compiled.elbo.sum_is_finite", lambda tensors: sum(map(torch.sum, tensors)) < 0
    )
    found = []
    for device in ("cuda", "cpu"):
        monkeypatch.setattr(ahead, "DEVICE", device)
        torch.manual_seed(0)
        lr = torch.tensor(1e-2) if as_tensor else 1e-2  # a scheduler fills the tensor
        found.append(trained(normed(), Noisy(batches()), lr=lr))
    assert len(launched) > BATCHES
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=0)


def test_a_checkpoint_in_mid_pass_holds_what_was_launched(launched, tmp_path):
    class StopError(Exception):
        pass

    class Stopping(list):
        def __iter__(self):
            for i, x in enumerate(super().__iter__()):
                if i == 18:
                    raise StopError
                yield x

    def train(read, name, resume=False):
        torch.manual_seed(0)
        checkpoint = pv.Checkpoint(tmp_path / name, every=6, resume=resume)
        return trained(pair(), read, epochs=1, checkpoint=checkpoint)

    whole = train(batches(), "whole.pt")
    with pytest.raises(StopError):
        train(Stopping(batches()), "parts.pt")
    assert len(launched) > 30
    resumed = train(batches(), "parts.pt", resume=True)
    assert resumed[0] == whole[0]
    torch.testing.assert_close(resumed[1], whole[1], rtol=0, atol=0)


@pytest.mark.parametrize("make", [pair, normed])
def test_large_batches_and_buffers_are_not_kept_for_long(make, launched, monkeypatch):
    programs = make()
    buffers = sum(buffer.nbytes for program in programs for buffer in program.buffers())
    monkeypatch.setattr(ahead, "BYTES", 5 * (data(size=4).nbytes + buffers))
    most, settle = [], ahead.StepsAhead.settle

    def seen(steps):
        most.append(len(steps._launched))
        return settle(steps)

    monkeypatch.setattr(ahead.StepsAhead, "settle", seen)
    trained(programs, batches(), epochs=1)
    assert max(most) == 6


class Watched(pv.SVI):
    def step(self, *args):
        return super().step(*args)


def with_a_hook(register):
    svi = svi_of(pair())
    register(svi)
    return svi


@pytest.mark.parametrize(
    "make",
    [
        lambda: svi_of(pair(), loss=Trace_ELBO()),
        lambda: svi_of(pair(), loss=pv.CompiledELBO(Trace_ELBO(), backend="eager", check=True)),
        lambda: svi_of(pair(), fused=False),
        lambda: pv.SVI(*(p := pair()), torch.optim.RMSprop(pv.parameters(*p)), loss=compiled()),
        lambda: Watched(*(p := pair()), torch.optim.Adam(pv.parameters(*p), fused=True), loss=compiled()),
        lambda: with_a_hook(lambda svi: svi.optimizer.register_step_pre_hook(lambda *_: None)),
        lambda: with_a_hook(lambda svi: svi.optimizer.register_step_post_hook(lambda *_: None)),
        lambda: with_a_hook(
            lambda svi: svi.optimizer.param_groups[0]["params"][0].register_hook(lambda g: g)
        ),
    ],
    ids=["an ELBO", "checked", "not fused", "RMSprop", "a subclass", "before", "after", "a gradient's"],
)
def test_it_waits_where_it_must(make, launched):
    (record,) = pv.fit(make(), batches()[:4], 1)
    assert launched == []
    assert record.loss > 0


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
def test_fused_optimisers_skip(make, launched):
    svi = svi_of(pair(), make=make)
    list(pv.fit(svi, batches()[:4], 1))
    assert len(launched) == 3
    before = [p.detach().clone() for p in pv.parameters(svi.model, svi.guide)]
    svi._launch(torch.ones(()), (batches()[0],))
    torch.testing.assert_close(pv.parameters(svi.model, svi.guide), before, rtol=0, atol=0)
    assert not hasattr(svi.optimizer, "found_inf")
