"""Several processes: the gradient of the joint batch, other noise in each, and a run that goes on."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.nn import PyroModule
from registry import data, pair
from torch import distributed

import pyro_vae as pv
from distributed import sum_gradients

EXAMPLE = Path(__file__).parents[2] / "examples" / "distributed.py"
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", EXAMPLE]


class GivenNoise(PyroModule):
    """The guide of a pair, with its noise as data: z = mu + sigma eps."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, x, noise):
        q = self.encoder(x)
        z = q.mean + q.stddev * noise
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(z, log_density=q.log_prob(z), event_dim=1))


class WithNoise(PyroModule):
    """The model of a pair, which ignores the noise."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, noise):
        return self.model(x)


def make(objective):
    torch.manual_seed(0)
    model, guide = pair()
    model, guide = WithNoise(model), GivenNoise(guide.encoder)
    optimizer = torch.optim.SGD(pv.parameters(model, guide), lr=0.01)
    return pv.SVI(model, guide, optimizer, loss=objective), optimizer, (data(), torch.randn(8, 2))


def gradients(svi):
    return [p.grad.clone() for p in pv.parameters(svi.model, svi.guide)]


OBJECTIVES = {
    "eager": Trace_ELBO,
    "replayed": lambda: pv.CompiledELBO(Trace_ELBO(), backend="eager"),
}


def in_one_of_two(rank, folder, task, *arguments):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(task(rank, folder, *arguments), folder / f"{rank}.pt")
    distributed.destroy_process_group()


def in_two(folder, task, *arguments):
    """Run a task in two processes; return their results."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pyro_vae"])
    started = [
        context.Process(target=in_one_of_two, args=(rank, folder, task, *arguments)) for rank in (0, 1)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
        assert process.exitcode == 0
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def gradients_of_part(rank, folder):
    found = {}
    for name, objective in OBJECTIVES.items():
        svi, optimizer, batch = make(objective())
        optimizer.register_step_pre_hook(sum_gradients)
        svi.step(*(part[rank::2] for part in batch))
        found[name] = gradients(svi)
    return found


def test_the_gradients_of_two_processes_are_that_of_the_joint_batch(tmp_path):
    found = in_two(tmp_path, gradients_of_part)
    for name, objective in OBJECTIVES.items():
        svi, _, batch = make(objective())
        svi.step(*batch)
        for of_process in found:
            torch.testing.assert_close(of_process[name], gradients(svi))


def draws(rank, folder, resume):
    torch.manual_seed(0)
    svi = pv.SVI(*pair(), pyro.optim.Adam({"lr": 0.01}), loss=Trace_ELBO())
    svi.optimizer.register_step_pre_hook(sum_gradients)
    torch.manual_seed(rank + 9 * resume)
    checkpoint = pv.Checkpoint(folder / "run.pt", resume=resume, every=2)
    seen = []
    batches = pv.data.Batches((255 * data(size=12)).to(torch.uint8), pv.data.DynamicBinarisation(), 4)
    steps = []

    def stop_one(*_):
        steps.append(1)
        if rank == 1 and len(steps) == 5 and not resume:
            os.kill(os.getpid(), signal.SIGTERM)

    svi.optimizer.register_step_pre_hook(stop_one)
    try:
        for _ in pv.fit(svi, batches, 3, checkpoint=checkpoint, progress=False):
            seen.append(float(torch.rand(())))
    except SystemExit as stopped:
        seen.append(stopped.code)
    return seen, str([svi.model.state_dict(), svi.guide.state_dict()]), len(steps), torch.rand(1)


@pytest.mark.proofs
def test_a_signal_to_one_process_stops_all_and_they_go_on(tmp_path):
    first, second = in_two(tmp_path, draws, False)
    assert first[0][-1:] == second[0][-1:] == [143]
    assert first[1] == second[1]  # the same parameters in both
    assert first[2] == second[2] == 5
    assert first[0][:-1] != second[0][:-1]  # and other noise
    (tmp_path / "meet").unlink(missing_ok=True)
    first, second = in_two(tmp_path, draws, True)
    assert first[1] == second[1]
    assert first[2] == second[2] == 4
    assert not torch.equal(first[3], second[3])


def launch(out, *options):
    line = [*LAUNCH, "--hidden-dim", 8, "--latent-dim", 2, "--batch-size", 4000, "--num-samples", 2]
    line += ["--epochs", 3, *options, "--out", out]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(list(map(str, line)), env=env, stdout=subprocess.DEVNULL)


def results(out):
    numbers = json.loads((out / "summary.json").read_text())
    return numbers | {"seconds": 0}, torch.load(out / "weights.pt")


@pytest.mark.proofs
@pytest.mark.parametrize("kill", ["both by SIGTERM", "one by SIGKILL"])
def test_torchrun_goes_on_with_a_run_that_was_killed(kill, tmp_path):
    whole = launch(tmp_path / "whole")
    assert whole.wait(300) == 0
    started = launch(tmp_path / "killed")
    while not (tmp_path / "killed" / "metrics.jsonl").exists():
        time.sleep(0.05)
        assert started.poll() is None
    if kill == "both by SIGTERM":
        started.send_signal(signal.SIGTERM)
    else:
        workers = subprocess.check_output(["pgrep", "-P", str(started.pid)], text=True).split()
        os.kill(int(workers[-1]), signal.SIGKILL)
    assert started.wait(60) != 0
    assert not (tmp_path / "killed" / "summary.json").exists()
    resumed = launch(tmp_path / "killed", "--resume")
    assert resumed.wait(300) == 0
    (numbers, weights), (expected, expected_weights) = (
        results(tmp_path / "killed"),
        results(tmp_path / "whole"),
    )
    assert numbers == expected
    torch.testing.assert_close(weights, expected_weights, rtol=0, atol=0)


@pytest.mark.proofs
def test_a_bad_batch_in_one_process_ends_all_with_its_message(tmp_path):
    script = tmp_path / "bad.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(EXAMPLE.parent)!r})\n"
        "import pyro_vae as pv, torch, os\n"
        "read = pv.data.DynamicBinarisation._read\n"
        "calls = []\n"
        "def bad(self, stored, generator):\n"
        "    calls.append(1)\n"
        "    x = read(self, stored, generator)\n"
        "    return x + 7 if os.environ['RANK'] == '1' and len(calls) == 9 else x\n"
        "pv.data.DynamicBinarisation._read = bad\n"
        f"sys.argv[0] = {str(EXAMPLE)!r}\n"
        "import runpy; runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    line = [
        *LAUNCH[:-1],
        script,
        "--hidden-dim",
        8,
        "--batch-size",
        4000,
        "--epochs",
        1,
        "--out",
        tmp_path / "out",
    ]
    start = time.monotonic()
    ended = subprocess.run(list(map(str, line)), capture_output=True, text=True, check=False)
    assert ended.returncode != 0
    assert "distributed.py: error: Site 'x' of the model, Bernoulli: expected 0 or 1" in ended.stderr
    assert time.monotonic() - start < 120  # and not the time-out of a message, which is half an hour
