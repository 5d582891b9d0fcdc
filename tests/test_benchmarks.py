"""The benchmarks time contenders that do the same work, and say so where one does not."""

import argparse
import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import platformdirs
import pyro
import pytest
import torch
from torch import nn

import pyro_vae as pv

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "docs")]

import _records  # noqa: E402
import _speed  # noqa: E402
import contenders  # noqa: E402
import protocols  # noqa: E402
import run  # noqa: E402

IN_MEMORY = [
    "PyTorch, default Adam",
    "PyTorch, fused Adam",
    "pyro.infer.SVI, Trace",
    "pyro_vae, TraceMeanField",
]
RECIPES = ["PyTorch examples' recipe", "Pyro tutorial's recipe"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    images = pv.data.load()
    np.save(folder / "train.npy", images.pixels[:600].numpy())
    (folder / "MNIST").symlink_to(Path(platformdirs.user_cache_dir("pyro_vae"), "MNIST"))
    return contenders.Work(folder, batch=50, images=600)


@pytest.fixture
def make(work):
    """Make a contender; torch's switches are put back afterwards."""
    yield lambda name: contenders.CONTENDERS[name].load()(work, **contenders.CONTENDERS[name].options)
    torch.set_flush_denormal(False)
    torch.set_float32_matmul_precision("highest")
    pyro.clear_param_store()


def test_contenders_start_and_train_alike(make, work):
    first, last, elbos = {}, {}, {}
    for name in IN_MEMORY:
        contender = make(name)
        assert all(np.array_equal(a, b) for a, b in zip(contender.weights(), work.weights(), strict=True))
        first[name] = contender.steps(1)
        elbos[name] = -contender.epoch()
        last[name] = contender.steps(100)
        expected = -protocols.elbo_on_test(contender.weights(), work.observed(), softplus=False)
        protocols._check_loss(name, last[name], expected)
        with pytest.raises(ValueError, match="minimises something else"):
            protocols._check_loss(name, last[name] - kl(contender.weights(), work.observed()), expected)
    protocols._check_same_work(first, 0.01, "the first step")
    protocols._check_same_work(last, 0.2, "the last step")
    assert last["PyTorch, fused Adam"] < 0.5 * first["PyTorch, fused Adam"]


def kl(weights, x):
    features = np.maximum(x @ weights[0] + weights[1], 0) @ weights[2] + weights[3]
    mean, log_sigma = np.split(features, 2, -1)
    return 0.5 * (np.exp(2 * log_sigma) + mean**2 - 1 - 2 * log_sigma).sum(-1).mean()


@pytest.mark.parametrize("name", ["PyTorch, fused Adam", "pyro_vae, TraceMeanField"])
def test_batches_are_binarised_anew(name, make, work):
    p = work.pixels() / 255
    contender = make(name)
    for _ in range(2):
        batches = list(contender.batches())
        assert [len(x) for x in batches] == [50] * 12
        x = torch.cat(batches)
        assert set(x.unique().tolist()) == {0.0, 1.0}
        # Thresholding is off by 20 of these standard deviations.
        assert float(x.sum()) == pytest.approx(p.sum(), abs=5 * np.sqrt((p * (1 - p)).sum()))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_minimises_what_its_weights_say(name, make):
    contender = make(name)
    x = next(contender.batches())
    assert x.shape == (50, 1, 28, 28)
    assert ((x > 0) & (x < 1)).any()
    losses = [contender.epoch() for _ in range(2)]
    assert losses[1] < losses[0]
    with torch.no_grad():
        contender.spread.bias += 2  # so that a wrong scale of sigma is far off
    softplus = contenders.CONTENDERS[name].softplus
    expected = -protocols.elbo_on_test(contender.weights(), x.flatten(1).numpy(), softplus=softplus)
    assert contender.step(x) / len(x) == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("decoded", [0, 1])
def test_the_evaluation_is_that_of_the_package(decoded, work):
    """With a constant decoder there is no noise; with another the two differ by their noise alone."""
    weights = work.weights()
    weights[6] *= decoded
    x = protocols.binarised(pv.data.load(train=False).pixels[:500].numpy())
    linears = [nn.Linear(*w.shape) for w in weights[::2]]
    for linear, w, b in zip(linears, weights[::2], weights[1::2], strict=True):
        linear.weight.data, linear.bias.data = torch.from_numpy(w.T.copy()), torch.from_numpy(b)
    a, b, c, d = linears
    model = pv.Model(pv.StandardNormal(20), nn.Sequential(c, nn.ReLU(), d, pv.Bernoulli()))
    guide = pv.Guide(nn.Sequential(a, nn.ReLU(), b, pv.DiagNormal()))
    terms = [pv.elbo_terms(model, guide, torch.from_numpy(x)) for _ in range(8)]
    error = 4 * np.std([float(t.elbo.mean()) for t in terms], ddof=1) if decoded else 1e-3
    expected = np.mean([float(t.reconstruction.mean()) for t in terms]) - kl(weights, x)
    assert protocols.elbo_on_test(weights, x, softplus=False) == pytest.approx(expected, abs=error)


def test_a_contender_takes_part_where_it_can_run():
    assert "PyTorch, CUDA graph" not in contenders.taking_part("epochs")
    assert "PyTorch, CUDA graph" in contenders.taking_part("epochs", device="cuda")
    assert not set(RECIPES) & set(contenders.taking_part("epochs"))
    assert set(RECIPES) <= set(contenders.taking_part("training"))


def test_another_work_is_refused():
    losses = {"a": 100.0, "b": 101.0, "products": None, "c": 110.0}
    protocols._check_same_work(losses, 0.1, "the last step")
    with pytest.raises(ValueError, match="c does other work than the rest"):
        protocols._check_same_work(losses, 0.05, "the last step")
    with pytest.raises(ValueError, match="b does other work"):
        protocols._check_same_work({"a": 1.0, "b": float("nan"), "c": 1.0}, 0.05, "the last step")


def test_seconds_to_a_target():
    seconds, elbos = [2.0, 10.0, 4.0, 4.0], [-500.0, -120.0, -110.0, -100.0]
    assert protocols._seconds_to(-105, seconds, elbos) == 18.0
    assert protocols._seconds_to(-110, seconds, elbos) == 16.0
    assert protocols._seconds_to(-90, seconds, elbos) is None


def test_ratios_are_taken_within_a_round():
    times = {"PyTorch, fused Adam": [1.0, 10.0, 1.0], "NumPyro": [2.0, 20.0, 3.0]}
    assert protocols._ratios(times, "NumPyro") == {"x PyTorch": 2.0, "x NumPyro": 1.0}


def test_a_run_writes_a_record_that_the_documentation_prints(tmp_path, monkeypatch):
    name = "matrix products alone"
    monkeypatch.setattr(sys, "argv", ["benchmarks/run.py", "--contenders", name])
    options = argparse.Namespace(only=["steps"], quick=True, contenders=[name], batch_size=[8], threads=[1])
    vars(options).update(seeds=[0], device="cpu", out=tmp_path)
    run.main(argparse.Namespace(**vars(options), resume=False))
    record = json.loads((tmp_path / "steps.json").read_text())
    assert record["command"] == f"python benchmarks/run.py --contenders '{name}'"
    (row,) = record["rows"]
    assert (row["contender"], row["threads"], row["batch"], row["x products"]) == (name, 1, 8, 1.0)
    assert row["ms"] > 0

    written = (tmp_path / "steps.json").read_text()
    run.main(argparse.Namespace(**vars(options), resume=True))
    assert (tmp_path / "steps.json").read_text() == written
    options.batch_size = [16]
    with pytest.raises(ValueError, match="--resume: .* has other settings"):
        run.main(argparse.Namespace(**vars(options), resume=True))
    vars(options).update(device="cuda", only=["steps", "training"])
    with pytest.raises(ValueError, match="--device: expected with --only steps epochs"):
        run.main(argparse.Namespace(**vars(options), resume=False))

    printed = _speed.speed("steps", {"steps": record})
    assert "**Batch 8, 1 thread**" in printed
    assert f"| {name} | {_records.plain(row['ms'])} |" in printed
    assert record["command"] in printed


class Here:
    """A contender without a process of its own."""

    def __init__(self, name):
        self.entry = contenders.CONTENDERS[name]

    def make(self, work):
        self.contender = self.entry.load()(work, **self.entry.options)

    def run(self, method):
        start = time.perf_counter()
        return getattr(self.contender, method)(), time.perf_counter() - start


@pytest.mark.usefixtures("make")  # puts torch's switches back
def test_an_epoch_is_timed_on_the_path_of_its_contender(work, monkeypatch):
    monkeypatch.setattr(
        protocols, "processes", lambda names, _: nullcontext({name: Here(name) for name in names})
    )
    names = ["PyTorch, fused Adam", "pyro_vae, TraceMeanField"]
    rows = protocols.epochs(names, work, [50, 100], 1, protocols.Size(rounds=1))
    assert [(row["batch"], row["contender"]) for row in rows] == [(b, n) for b in (50, 100) for n in names]
    assert all(row["epoch, s"] > 0 for row in rows)
    record = {"work": "w", "settings": {}, "processor": "p", "versions": {}, "command": "c", "rows": rows}
    printed = _speed.on_a_gpu({"epochs": record})
    assert "**Batch 100, 1 thread**" in printed
    assert f"| {names[1]} | {_records.plain(rows[-1]['epoch, s'])} |" in printed
    assert _speed.on_a_gpu({}) == "*There is no run on record.*"


def test_the_documentation_prints_medians_over_seeds_and_draws_growth(tmp_path, monkeypatch):
    rows = [
        {"threads": 1, "seed": seed, "contender": name, "epoch, s": seconds, "to target, s": target}
        for seed, seconds in enumerate([1.0, 3.0, 2.0])
        for name, target in (("a", 10.0 + seed), ("b", None if seed else 9.0))
    ]
    printed = _speed.training_tables({"rows": rows})
    assert "| a | 2 | 11 |" in printed
    assert "| b | 2 | - |" in printed

    rows = [
        {
            "threads": 1,
            "axis": axis,
            "value": value,
            "contender": "a",
            "time": 2.0 * value,
            "unit": "ms a step",
        }
        for axis in ("batch", "latent", "particles", "images")
        for value in (1, 1000)
    ]
    monkeypatch.setattr(_speed, "__file__", str(tmp_path / "_speed.py"))
    printed = _speed.growth_tables({"rows": rows})
    assert "| contender | 1 | 1,000 |" in printed
    assert "| a | 2 | 2000 |" in printed
    assert (tmp_path / "_build" / "growth.svg").read_bytes().startswith(b"<?xml")
