"""Progress bars: for a person alone, and as long as the work."""

import io

import pytest
from registry import data, pair

import pyro_vae as pv
from pyro_vae.evaluation import annealing, weights
from pyro_vae.progress_bar import progress_bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stream", "shows", "written"),
    [(Terminal(), True, True), (Terminal(), False, False), (io.StringIO(), True, False)],
    ids=["terminal", "switched off", "file"],
)
def test_only_a_terminal_gets_a_bar(stream, shows, written, monkeypatch):
    monkeypatch.setattr("sys.stderr", stream)
    assert list(progress_bar(range(3), shows=shows)) == [0, 1, 2]
    assert bool(stream.getvalue()) == written


@pytest.mark.parametrize("size", [3, 50])
@pytest.mark.parametrize(
    ("module", "call", "per_data_point"),
    [
        (weights, lambda *args: pv.log_evidence(*args, 151), 151),  # draws a few too many
        (weights, lambda *args: pv.evidence_diagnostics(*args, 151), 151),
        (annealing, lambda *args: pv.annealed_evidence(*args, num_chains=2, num_steps=2), 1),
    ],
    ids=["log_evidence", "evidence_diagnostics", "annealed_evidence"],
)
def test_an_evaluation_fills_its_bar(module, call, per_data_point, size, monkeypatch):
    bars = []

    def shown(**options):
        options.pop("delay")
        bars.append(progress_bar(**options))
        return bars[-1]

    monkeypatch.setattr("sys.stderr", Terminal())
    monkeypatch.setattr(module, "progress_bar", shown)
    call(*pair(), data(size=size))
    (bar,) = bars
    assert bar.n == bar.total == size * per_data_point
