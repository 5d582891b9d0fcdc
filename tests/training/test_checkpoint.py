"""A checkpoint: a training that stops anywhere and goes on ends as one that never stopped, bit by bit."""

import errno
import os
import random
import shutil
import signal

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from registry import data, pair
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import pyro_vae as pv

PIXELS = (torch.arange(22 * 6) * 37 % 251).to(torch.uint8).reshape(22, 6)
ROWS = (PIXELS > 99).float()


class Noisy(torch.utils.data.Dataset):
    """A data set that draws from all the generators that users draw from."""

    def __len__(self):
        return len(PIXELS)

    def __getitem__(self, index):
        noise = random.random() + np.random.rand() + torch.rand(6)  # noqa: NPY002
        return (PIXELS[index] / 255 > noise / 3).float()


BATCHES = {
    "Batches": lambda: pv.data.Batches(PIXELS, pv.data.DynamicBinarisation(), 4),
    "DataLoader": lambda: DataLoader(Noisy(), 4, shuffle=True),
    "DataLoader with workers": lambda: DataLoader(Noisy(), 4, shuffle=True, num_workers=1),
    "DataLoader with a generator": lambda: DataLoader(
        TensorDataset(ROWS), 4, shuffle=True, generator=torch.Generator().manual_seed(5)
    ),
    "list": lambda: list(ROWS.split(4)),
}


class Normed(nn.Sequential):
    """An encoder with running means and Dropout."""

    def __init__(self):
        super().__init__(
            nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.2), nn.Linear(5, 4), pv.DiagNormal()
        )


def normed():
    return pair()[0], pv.Guide(Normed())


def train(path, batches, *, resume=False, steps=None, made=normed, loss=Trace_ELBO, epochs=3, every=1, **fit):
    """Train, and draw random numbers in the loop; return what is left. After ``steps``, be interrupted."""
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(99 if path.exists() else 0)  # so that a state which is not restored shows
    model, guide = made()
    svi = pv.SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), loss=loss())
    checkpoint = pv.Checkpoint(path, resume=resume, every=every)
    done = []

    def interrupt(*_):
        done.append(1)
        if len(done) == steps:
            raise KeyboardInterrupt

    draws, scheduler = [], None
    if pv.parameters(model, guide):
        scheduler = torch.optim.lr_scheduler.OneCycleLR(svi.optimizer, 0.02, 40)
        svi.optimizer.register_step_pre_hook(interrupt)
    try:
        for _ in pv.fit(svi, batches(), epochs, scheduler=scheduler, checkpoint=checkpoint, **fit):
            draws.append([float(torch.rand(())), random.random()])
    except KeyboardInterrupt:
        return None
    return {
        "model": model.state_dict(),
        "guide": guide.state_dict(),
        "optimizer": svi.optimizer.state_dict(),
        "epochs": [epoch._replace(seconds=0.0) for epoch in checkpoint.epochs],
        "random": [torch.get_rng_state(), random.random(), float(np.random.rand())],  # noqa: NPY002
        "drawn in the last pass": draws[-1:],
    }


def same(first, second):
    torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)


def goes_on(tmp_path, batches, *stops, **options):
    """Check that a training which is interrupted at steps ends as one that is not."""
    whole = train(tmp_path / "whole.pt", batches, **options)
    for stop in stops:
        path = tmp_path / f"{stop}.pt"
        assert train(path, batches, steps=stop, **options) is None
        same(train(path, batches, resume=True, **options), whole)


@pytest.mark.parametrize("batches", BATCHES.values(), ids=BATCHES)
def test_a_training_goes_on_from_any_step_to_the_last_bit(batches, tmp_path):
    goes_on(tmp_path, batches, 7, 17)


def test_a_replayed_training_goes_on_to_the_last_bit(tmp_path):
    goes_on(
        tmp_path,
        BATCHES["Batches"],
        5,
        13,
        loss=lambda: pv.CompiledELBO(TraceMeanField_ELBO(), backend="eager"),
        made=pair,
    )


def test_a_training_goes_on_twice_and_from_a_file_that_is_written_once_a_pass(tmp_path):
    batches = BATCHES["Batches"]
    whole = train(tmp_path / "whole.pt", batches, every=None)
    for first, second in ((8, 3), (8, 9)):
        path = tmp_path / f"{first} {second}.pt"
        train(path, batches, steps=first, every=None)
        train(path, batches, steps=second, every=None, resume=True)
        same(train(path, batches, every=None, resume=True), whole)


def test_a_finished_training_is_not_trained_again(tmp_path):
    path, batches = tmp_path / "a.pt", BATCHES["Batches"]
    whole, before = train(path, batches), path.read_bytes()
    again = train(path, batches, resume=True)
    assert (again.pop("drawn in the last pass"), len(whole.pop("drawn in the last pass"))) == ([], 1)
    same(again, whole)
    assert path.read_bytes() == before


class Stream(IterableDataset):
    def __iter__(self):
        return iter(ROWS)


class Fresh:
    """An iterable of which nobody knows whether it comes again in the same order."""

    def __iter__(self):
        return iter(ROWS.split(4))


@pytest.mark.parametrize("batches", [Fresh, lambda: DataLoader(Stream(), 4)], ids=["iterable", "stream"])
def test_other_iterables_go_on_from_the_start_of_a_pass(batches, tmp_path, capsys):
    goes_on(tmp_path, batches, 3, 13)


@pytest.mark.parametrize("watch", [None, ROWS[:5]], ids=["by default", "given"])
def test_what_is_watched_stays_the_same(watch, tmp_path):
    goes_on(tmp_path, BATCHES["Batches"], 3, 8, watch=watch)


def test_parameters_that_are_made_at_first_use_go_on(tmp_path):
    def batches():
        return [ROWS]

    def made():
        model, _ = pair()
        return model, AutoNormal(pyro.poutine.block(model, hide=["x"]))

    whole = train(tmp_path / "whole.pt", batches, made=made, epochs=4)
    train(tmp_path / "a.pt", batches, made=made, epochs=2)
    same(train(tmp_path / "a.pt", batches, made=made, epochs=4, resume=True), whole)


# The file.


def test_the_file_is_of_plain_tensors_and_loads_anywhere(tmp_path):
    left = train(tmp_path / "a.pt", BATCHES["Batches"])
    file = torch.load(tmp_path / "a.pt", weights_only=True)
    model, guide = normed()
    model.load_state_dict(file["model"])
    guide.load_state_dict(file["guide"])
    same([model.state_dict(), guide.state_dict()], [left["model"], left["guide"]])
    assert file["epochs"][-1][0] == 3
    assert (tmp_path / "a.pt").stat().st_size < 100_000  # no view is written with what it is a view of


def one_cycle(optimizer):
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, 40)


def refused(tmp_path, message, **options):
    """Check that a checkpoint of ``train`` is refused, and that nothing has changed."""
    path = tmp_path / "a.pt"
    train(path, BATCHES["Batches"], steps=3)
    before = path.read_bytes()
    model, guide = options.get("programs", normed)()
    trained = options.get("parameters", pv.parameters(model, guide))
    optimizer = options.get("optimizer", torch.optim.Adam)(trained, 0.02)
    svi = pv.SVI(model, guide, optimizer, loss=options.get("loss", Trace_ELBO()))
    scheduler = options.get("scheduler", one_cycle)(optimizer)
    state = str([model.state_dict(), guide.state_dict(), optimizer.state_dict()])
    random_state = torch.get_rng_state()
    batches = options.get("batches", BATCHES["Batches"]())
    with pytest.raises(ValueError, match=message):
        list(pv.fit(svi, batches, 3, scheduler=scheduler, checkpoint=pv.Checkpoint(path, resume=True)))
    assert str([model.state_dict(), guide.state_dict(), optimizer.state_dict()]) == state
    assert torch.equal(torch.get_rng_state(), random_state)
    assert path.read_bytes() == before


OTHERS = {
    "architecture": (
        {"programs": pair},
        "a guide with 'encoder.0.weight' of shape .5, 6., as in the file, got none",
    ),
    "width": (
        {"programs": lambda: (pair(dim=3)[0], normed()[1])},
        "a model with 'decoder.0.0.weight' of shape .5, 2., as in the file, got shape .5, 3.",
    ),
    "optimizer": ({"optimizer": torch.optim.SGD}, "a training with optimizer Adam, as in the file, got SGD"),
    "objective": (
        {"loss": pv.IWAE(2)},
        "with objective Trace_ELBO of 1 particles, as in the file, got IWAE of 2 particles",
    ),
    "scheduler": ({"scheduler": lambda o: None}, "with scheduler OneCycleLR, as in the file, got None"),
    "protocol": (
        {"batches": pv.data.Batches(torch.randint(256, (24, 6), dtype=torch.uint8), pv.data.Grey(), 4)},
        "with protocol dynamic binarisation, as in the file, got grey pixels",
    ),
    "likelihood": (
        {"programs": lambda: (pair("continuous-bernoulli")[0], normed()[1])},
        r"Bernoulli\(\) at 'model.decoder.1', as in the file, got ContinuousBernoulli\(\)",
    ),
    "number of batches": ({"batches": list(ROWS.split(5))}, "with batches 6, as in the file, got 5"),
}


@pytest.mark.parametrize(("options", "message"), OTHERS.values(), ids=OTHERS)
def test_the_file_of_another_training_is_refused(options, message, tmp_path):
    refused(tmp_path, f"{message}. To fix: resume with the program", **options)


def test_an_optimiser_of_some_parameters_is_refused(tmp_path):
    model, guide = normed()
    some = {"programs": lambda: (model, guide), "parameters": list(guide.parameters())}
    refused(tmp_path, "an optimiser of the same parameters, got .'model.decoder.0.0.bias'", **some)


def test_another_fixed_sigma_is_refused(tmp_path):
    """It is a buffer, which the file would set back."""
    for sigma, resume in ((0.1, False), (0.1, True), (1.0, True)):
        model, guide = pair("gaussian")
        model.decoder[1] = pv.Gaussian(sigma)
        svi = pv.SVI(model, guide, torch.optim.Adam(pv.parameters(model, guide)), loss=Trace_ELBO())
        running = pv.fit(svi, [data()], 1, checkpoint=pv.Checkpoint(tmp_path / "a.pt", resume=resume))
        if sigma == 1.0:
            with pytest.raises(
                ValueError, match=r"FixedSigma\(0.1\) at 'model.decoder.1.sigma', as in the file"
            ):
                list(running)
        else:
            list(running)


@pytest.mark.parametrize("changed", [{"lr": 3e-3}, {"betas": (0.5, 0.9)}, {"lr": 3e-3, "weight_decay": 0.1}])
def test_another_option_of_the_optimiser_goes_on_with_a_warning(changed, tmp_path):
    for options in ({}, changed):
        programs = pair()
        optimizer = torch.optim.Adam(pv.parameters(*programs), **({"lr": 1e-3} | options))
        svi = pv.SVI(*programs, optimizer, loss=Trace_ELBO())
        running = pv.fit(svi, [data()], 2, checkpoint=pv.Checkpoint(tmp_path / "a.pt", resume=True))
        if options:
            message = "resumes with " + ", ".join(f"{name} = .*, not .*" for name in options)
            with pytest.warns(UserWarning, match=f"{message}, as in the file. To change it, set svi.optim"):
                list(running)
        else:
            next(running)
    assert optimizer.param_groups[0]["lr"] == 1e-3


@pytest.mark.parametrize("again", [False, True])
def test_a_rate_that_a_scheduler_has_changed_goes_on_without_a_warning(again, tmp_path):
    """Also where the same optimiser trains on, in a second call."""

    def make():
        programs = pair()
        optimizer = torch.optim.Adam(pv.parameters(*programs), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return pv.SVI(*programs, optimizer, loss=Trace_ELBO()), scheduler

    svi, scheduler = make()
    for epochs in (2, 3):
        checkpoint = pv.Checkpoint(tmp_path / "a.pt", resume=True)
        list(pv.fit(svi, [data()], epochs, scheduler=scheduler, checkpoint=checkpoint))
        if not again:
            svi, scheduler = make()
    assert len(checkpoint.epochs) == 3


def test_parameters_in_another_order_keep_their_state(tmp_path):
    path, batches = tmp_path / "a.pt", BATCHES["list"]()
    model, guide = pair()
    svi = pv.SVI(model, guide, torch.optim.Adam(pv.parameters(model, guide)), loss=Trace_ELBO())
    list(pv.fit(svi, batches, 1, checkpoint=pv.Checkpoint(path)))
    twin = pair()
    turned = torch.optim.Adam(pv.parameters(*twin)[::-1])
    other = pv.SVI(*twin, turned, loss=Trace_ELBO())
    list(pv.fit(other, batches, 1, checkpoint=pv.Checkpoint(path, resume=True)))
    expected, found = (
        {
            name: s.optimizer.state[p]["exp_avg"]
            for m in (s.model, s.guide)
            for name, p in m.named_parameters()
        }
        for s in (svi, other)
    )
    same(found, expected)


SETTINGS = {
    "another value": ({"a": 2}, "the setting a = 1, as in the file, got 2"),
    "none": ({}, "the setting a = 1, as in the file, got 'nothing'"),
    "one more": ({"a": 1, "b": 0}, "the setting b = 'nothing', as in the file, got 0"),
}


@pytest.mark.parametrize(("settings", "message"), SETTINGS.values(), ids=SETTINGS)
def test_other_settings_are_refused_by_name(settings, message, tmp_path):
    path = tmp_path / "a.pt"
    svi = pv.SVI(*pair(), pyro.optim.Adam({"lr": 1e-3}), loss=Trace_ELBO())
    list(pv.fit(svi, [data()], 1, checkpoint=pv.Checkpoint(path, settings={"a": 1})))
    assert len(pv.Checkpoint(path, settings={"a": 1}, resume=True).epochs) == 1
    with pytest.raises(ValueError, match=message):
        pv.Checkpoint(path, settings=settings, resume=True)


class Malicious:
    def __reduce__(self):
        return print, ("run",)


FILES = {
    "nothing": (lambda path: path.write_bytes(b""), "damaged"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-500]), "damaged"),
    "bytes": (lambda path: path.write_bytes(b"abc" * 1000), "damaged"),
    "other tensors": (
        lambda path: torch.save({"model": {}}, path),
        "another one .None",
    ),
    "a list": (lambda path: torch.save([1], path), "another one .'list'"),
    "code": (lambda path: torch.save({"format": Malicious()}, path), "holds something else: .*Unpickling"),
}


@pytest.mark.parametrize(("damage", "message"), FILES.values(), ids=FILES)
def test_a_file_that_is_no_checkpoint_is_refused(damage, message, tmp_path, capsys):
    path = tmp_path / "a.pt"
    train(path, BATCHES["list"], steps=3)
    damage(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"a.pt: expected .*{message}.*To fix: choose the right file"):
        pv.Checkpoint(path, resume=True)
    assert path.read_bytes() == before
    assert "run" not in capsys.readouterr().out


def test_a_state_that_the_file_cannot_hold_is_refused(tmp_path):
    svi = pv.SVI(*pair(), pyro.optim.Adam({"lr": 1e-3}), loss=Trace_ELBO())
    checkpoint = pv.Checkpoint(tmp_path / "a.pt", settings={"network": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match="a.pt: expected a training of plain tensors and numbers.*settings"):
        list(pv.fit(svi, [data()], 1, checkpoint=checkpoint))
    assert not (tmp_path / "a.pt").exists()


def test_other_versions_and_threads_go_on_with_a_warning(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    train(path, BATCHES["list"], steps=3)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    with pytest.warns(UserWarning, match="resumes, but perhaps not to the last bit .* with threads .* -> 77"):
        assert train(path, BATCHES["list"], resume=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": 3}, "path: expected the path of a file, got 3"),
        ({"path": "."}, "expected a file, got a folder"),
        ({"path": "a.pt", "every": 0}, "every: expected a positive whole number, got 0"),
        ({"path": "a.pt", "resume": 1}, "resume: expected True or False, got 1"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        pv.Checkpoint(**options)


def test_an_iterator_cannot_be_continued(tmp_path):
    svi = pv.SVI(*pair(), pyro.optim.Adam({"lr": 1e-3}), loss=Trace_ELBO())
    with pytest.raises(ValueError, match="batches: expected an iterable that starts again.*list_iterator"):
        pv.fit(svi, iter([data()]), 1, checkpoint=pv.Checkpoint(tmp_path / "a.pt"))


@pytest.mark.proofs
def test_a_compiled_training_goes_on_to_the_last_bit(tmp_path):
    goes_on(tmp_path, BATCHES["Batches"], 5, loss=lambda: pv.CompiledELBO(TraceMeanField_ELBO()), made=pair)


# Faults.


def test_a_checkpoint_that_cannot_be_written_is_one_line_and_the_last_one_is_whole(tmp_path, monkeypatch):
    path, write = tmp_path / "a.pt", os.replace
    whole = train(tmp_path / "whole.pt", BATCHES["list"])

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", lambda *names: full() if path.exists() else write(*names))
    with pytest.raises(
        ValueError, match=r"a.pt: expected to write the checkpoint, got .* No space left.*resume"
    ):
        train(path, BATCHES["list"])
    assert pv.Checkpoint(path, resume=True).resumes
    monkeypatch.undo()
    same(train(path, BATCHES["list"], resume=True), whole)


def test_a_folder_that_vanishes_is_made_again(tmp_path):
    def batches():
        yielded = list(ROWS.split(4))
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
        return yielded

    train(tmp_path / "runs" / "a.pt", batches, every=None)
    train(tmp_path / "runs" / "a.pt", batches, every=None)
    assert pv.Checkpoint(tmp_path / "runs" / "a.pt", resume=True).resumes


def test_a_folder_that_becomes_a_file_is_one_line(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(
        ValueError, match=r"a.pt: expected to write the checkpoint, got .*(exists|Not a directory)"
    ):
        train(tmp_path / "runs" / "a.pt", BATCHES["list"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
@pytest.mark.parametrize("batches", [BATCHES["Batches"], Fresh], ids=["Batches", "other batches"])
def test_a_request_to_stop_waits_for_the_step_and_saves(number, batches, tmp_path, capsys):
    path = tmp_path / "a.pt"
    model, guide = normed()
    svi = pv.SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), loss=Trace_ELBO())
    svi.optimizer.register_step_pre_hook(lambda *_: os.kill(os.getpid(), number) if len(steps) == 8 else None)
    svi.optimizer.register_step_post_hook(lambda *_: steps.append(1))
    steps = []
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    error = KeyboardInterrupt if number == signal.SIGINT else SystemExit
    with pytest.raises(error) as stop:
        list(pv.fit(svi, batches(), 3, checkpoint=pv.Checkpoint(path)))
    assert len(steps) == 9
    assert number == signal.SIGINT or stop.value.code == 143
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    where = "1 epochs and 3 batches" if batches is not Fresh else "1 epochs"
    assert (
        capsys.readouterr().err == f"Stopped. {path} holds the training after {where}. To go on, resume it.\n"
    )
    file = torch.load(path, weights_only=True)
    is_now = all(torch.equal(file["model"][name], value) for name, value in model.state_dict().items())
    assert is_now == (batches is not Fresh)


def test_a_second_ctrl_c_does_not_wait(tmp_path):
    svi = pv.SVI(*normed(), pyro.optim.Adam({"lr": 0.02}), loss=Trace_ELBO())
    svi.num_data(ROWS[:4])

    def press_twice(*_):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    next(svi.guide.parameters()).register_hook(press_twice)
    with pytest.raises(KeyboardInterrupt):
        list(pv.fit(svi, BATCHES["list"](), 3, checkpoint=pv.Checkpoint(tmp_path / "a.pt")))
    assert not svi.optimizer.state  # it did not even wait for the update


def test_two_ctrl_c_in_an_update_wait_for_its_end():
    svi = pv.SVI(*normed(), pyro.optim.Adam({"lr": 0.02}), loss=Trace_ELBO())
    svi.optimizer.register_step_pre_hook(lambda *_: [os.kill(os.getpid(), signal.SIGINT)] * 2 and None)
    svi.optimizer.register_step_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        svi.step(ROWS[:4])
    assert len(svi.optimizer.state) == len(pv.parameters(svi.model, svi.guide))


def test_nan_in_mid_training_is_one_line_and_the_last_checkpoint_is_whole(tmp_path):
    path, bad = tmp_path / "a.pt", [*ROWS.split(4)]
    bad[2] = bad[2] * torch.nan
    with pytest.raises(ValueError, match="NaN in 24 of 24 values"):
        train(path, lambda: bad)
    same(train(path, BATCHES["list"], resume=True), train(tmp_path / "whole.pt", BATCHES["list"]))
