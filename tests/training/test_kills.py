"""Kills at random moments, the writing of files included: every run ends as one that never stopped."""

import multiprocessing
import os
import random
import shutil
import signal
import time

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from registry import pair

import pyro_vae as pv

EPOCHS, RUNS, KILLS = 4, 20, 5
PIXELS = (torch.arange(64 * 6) * 37 % 251).to(torch.uint8).reshape(64, 6)
OBJECTIVES = {
    "eager": Trace_ELBO,
    "replayed": lambda: pv.CompiledELBO(TraceMeanField_ELBO(), backend="eager"),
}


def run(folder, objective, seconds_a_step):
    """Train as a script does: write the metrics at each epoch, the weights at the end, the summary last."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, guide = pair(hidden=40)
    svi = pv.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss=OBJECTIVES[objective]())
    scheduler = torch.optim.lr_scheduler.OneCycleLR(svi.optimizer, 0.01, EPOCHS * 8)
    svi.optimizer.register_step_post_hook(lambda *_: time.sleep(seconds_a_step))
    batches = pv.data.Batches(PIXELS, pv.data.DynamicBinarisation(), 8)
    checkpoint = pv.Checkpoint(folder / "checkpoint.pt", resume=True, every=1)
    for _ in pv.fit(svi, batches, EPOCHS, scheduler=scheduler, checkpoint=checkpoint):
        numbers = [epoch._replace(seconds=0.0) for epoch in checkpoint.epochs]
        pv.write_file(folder / "metrics.txt", "\n".join(map(str, numbers)))
    state = str([model.state_dict(), guide.state_dict(), svi.optimizer.state_dict(), torch.rand(3)])
    pv.write_file(folder / "weights.txt", state + "end")
    pv.write_file(folder / "summary.txt", "end")


def files(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix == ".txt"}


def started(folder, *arguments):
    # A fork of a process that has imported all, so that a kill meets the training.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pyro_vae", "test_kills"])
    process = context.Process(target=run, args=(folder, *arguments))
    process.start()
    return process


@pytest.mark.proofs
@pytest.mark.parametrize("number", range(RUNS))
def test_kills_leave_no_trace(number, tmp_path):
    chance = random.Random(number)
    objective = list(OBJECTIVES)[number % 2]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    killed.mkdir()
    process = started(whole, objective, 0.0)
    process.join()
    assert process.exitcode == 0
    kills = 0
    while kills < KILLS:
        process = started(killed, objective, 0.05)
        process.join(chance.uniform(0.0, 0.8))
        if not process.is_alive():  # it has ended before
            shutil.rmtree(killed)
            killed.mkdir()
            continue
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += 1
        for file in killed.glob("*.pt"):
            assert pv.Checkpoint(file, resume=True).resumes  # whole at every moment
        for name, content in files(killed).items():
            assert name == "metrics.txt" or content.endswith(b"end")
    process = started(killed, objective, 0.0)
    process.join()
    assert process.exitcode == 0
    assert files(killed) == files(whole)
    assert not list(killed.glob(".*"))  # no half-written file is left
