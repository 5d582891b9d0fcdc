"""Runs that are longer, and data that are larger, than the memory: it stays flat."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc for the memory of a process")

HEAD = """
import ctypes, gc, torch, pyro, pyro_vae as pv
from pyro.infer import Trace_ELBO
from torch import nn
from torch.utils.data import DataLoader, Dataset

torch.set_num_threads(1)

def memory():  # of this process, in MiB, without pages of files
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

def svi(width):
    model = pv.Model(pv.StandardNormal(2), nn.Sequential(pv.MLP(2, 5, width), pv.Bernoulli()))
    guide = pv.Guide(nn.Sequential(pv.MLP(width, 5, 4), pv.DiagNormal()))
    return pv.SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), loss=LOSS)
"""


def printed(script, *arguments, loss="Trace_ELBO()"):
    code = HEAD.replace("LOSS", loss) + script
    line = [sys.executable, "-c", code, *map(str, arguments)]
    ended = subprocess.run(line, capture_output=True, text=True, check=True)
    return [float(number) for number in ended.stdout.split()]


@pytest.mark.proofs
def test_data_larger_than_memory_are_read_as_they_are_needed(tmp_path):
    file = tmp_path / "pixels.bin"
    with file.open("wb") as opened:
        opened.truncate(400 * 2**20)  # a file of zeros, which takes no disk
    script = """
import sys

class Mapped(Dataset):  # 512 KiB a row
    def __init__(self, file):
        self.rows = torch.from_file(file, shared=True, size=400 * 2**20, dtype=torch.uint8).view(800, -1)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index, :784].float()

batches = DataLoader(Mapped(sys.argv[1]), 20, shuffle=True, num_workers=2)
training = svi(784)
training.step(torch.zeros(20, 784))
before = memory()
for epoch in pv.fit(training, batches, 2, watch=torch.zeros(20, 784), progress=False):
    pass
print(memory() - before)
"""
    (growth,) = printed(script, file)
    assert growth < 40  # of 400


def test_a_process_of_the_data_that_dies_is_one_line_and_the_last_checkpoint_is_whole(tmp_path):
    script = """
import os, signal, sys, time

class Dying(Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, index):
        if index == 25:
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.ones(6)

checkpoint = pv.Checkpoint(sys.argv[1], every=1)
try:
    for _ in pv.fit(svi(6), DataLoader(Dying(), 2, num_workers=1), 1, checkpoint=checkpoint):
        pass
except RuntimeError as error:
    assert "expected the processes that read the data to stay alive, got: Data" in str(error)
    assert str(error).endswith("and resume.")
    print(pv.Checkpoint(sys.argv[1], resume=True)._found["positions"][0]["batch"])
"""
    (batches,) = printed(script, tmp_path / "a.pt")
    assert 1 <= batches <= 12


@pytest.mark.proofs
@pytest.mark.parametrize("loss", ["Trace_ELBO()", "pv.CompiledELBO(Trace_ELBO(), backend='eager')"])
def test_the_memory_of_a_long_run_is_flat(loss):
    script = """
training, batch = svi(6), torch.ones(8, 6)
for batches in (1_000, 100_000):
    list(pv.fit(training, [batch] * 1_000, batches // 1_000, progress=False))
    print(memory())
"""
    before, after = printed(script, loss=loss)
    assert after < 1.01 * before
