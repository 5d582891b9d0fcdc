"""The example on MNIST with the embedded data."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from registry import each_once

from pyro_vae.data_sets import DATA_SETS

EXAMPLES = Path(__file__).parents[1] / "examples"
LIKELIHOODS = {
    "bernoulli": ("dynamic binarisation", "mass", None),
    "gaussian": ("grey pixels", "density", None),
    "gaussian-learned": ("grey pixels", "density", [-6.0, 2.0]),
    "continuous-bernoulli": ("grey pixels", "density", None),
    "categorical": ("8 grey levels", "mass", None),
    "discretized-logistic": ("256 grey levels", "mass", [-6.0, 2.0]),
}
PICTURES = ["learning_curves", "reconstructions", "samples", "latent_plane"]


def run(monkeypatch, script, *options):
    file = str(EXAMPLES / f"{script}.py")
    monkeypatch.setattr(sys, "argv", [file, *map(str, options)])
    return runpy.run_path(file, run_name="__main__")


@pytest.mark.parametrize(("likelihood", "elbo"), each_once(LIKELIHOODS, ["trace", "mean-field"]))
def test_every_likelihood_with_every_elbo(likelihood, elbo, few, monkeypatch, tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    options = ["--likelihood", likelihood, "--elbo", elbo, "--hidden-dim", 16, "--latent-dim", 3]
    options += ["--epochs", 2, "--batch-size", 50, "--num-samples", 5, "--out", out]
    run(monkeypatch, "mnist_svi", *options)
    shown = capsys.readouterr().out
    protocol, kind, bounds = LIKELIHOODS[likelihood]
    assert str(out) in shown

    summary = json.loads((out / "summary.json").read_text())
    assert summary["likelihood"] == likelihood
    assert summary["elbo"] == elbo
    assert summary["protocol"] == protocol
    assert summary["unit"] == f"nats per data point, log {kind}"
    assert summary["log_sigma_bounds"] == bounds
    assert (summary["seed"], summary["epochs"], summary["num_samples"]) == (0, 2, 5)
    assert summary["device"] == "cpu"
    assert not {"out", "data_root"} & summary.keys()
    assert summary["seconds"] > 0
    parts = summary["test_reconstruction"] - summary["test_kl"]
    assert summary["test_elbo"] == pytest.approx(parts, rel=1e-4)
    assert summary["test_log_evidence"] > summary["test_elbo"] - 1
    # the line of the test: ELBO = reconstruction - KL
    names = ("test_elbo", "test_reconstruction", "test_kl", "test_log_evidence")
    elbo, reconstruction, kl, evidence = (f"{summary[name]:.2f}" for name in names)
    (line,) = (line for line in shown.splitlines() if line.startswith("test, "))
    assert line == (
        f"test, {protocol}, log {kind} in nats per data point: ELBO {elbo} = reconstruction "
        f"{reconstruction} - KL {kl}, log p(x) at least {evidence} (5 importance samples)"
    )

    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert rows[1]["loss"] < rows[0]["loss"]
    weights = torch.load(out / "weights.pt", weights_only=True)
    assert weights["model"]["decoder.0.0.weight"].shape == (16, 3)
    for name in PICTURES:
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_data_sets_are_those_of_the_package():
    assert runpy.run_path(str(EXAMPLES / "mnist_svi.py"))["DATA_SETS"] == list(DATA_SETS)


def test_kind_of_log_probability_is_that_of_the_support():
    """What the example says of each likelihood, against the distribution itself."""
    module = runpy.run_path(str(EXAMPLES / "mnist_svi.py"))
    for family, _, kind in module["LIKELIHOODS"].values():
        support = family(torch.zeros(family.num_features(4))).support
        assert support.is_discrete == (kind == "mass")


def test_a_plane_of_two_dimensions_has_its_manifold(few, monkeypatch, tmp_path):
    options = ["--hidden-dim", 8, "--latent-dim", 2, "--epochs", 1, "--num-samples", 1]
    run(monkeypatch, "mnist_svi", *options, "--out", tmp_path)
    assert (tmp_path / "manifold.png").exists()


@pytest.mark.filterwarnings("default")  # torch 2.11's compiler uses what torch deprecates
def test_compiled_and_in_reduced_precision(few, monkeypatch, tmp_path):
    options = ["--hidden-dim", 32, "--latent-dim", 3, "--epochs", 2, "--batch-size", 100, "--num-samples", 5]
    found = {}
    for name, more in (("plain", []), ("reduced", ["--compiled", "--bfloat16"])):
        run(monkeypatch, "mnist_svi", *options, *more, "--out", tmp_path / name)
        found[name] = json.loads((tmp_path / name / "summary.json").read_text())["test_elbo"]
    assert found["reduced"] == pytest.approx(found["plain"], rel=1e-2)
    assert found["reduced"] != found["plain"]


def test_a_seed_gives_the_same_numbers(few, monkeypatch, tmp_path):
    options = ["--hidden-dim", 8, "--latent-dim", 3, "--epochs", 1, "--num-samples", 2]
    numbers = []
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(monkeypatch, "mnist_svi", *options, "--seed", seed, "--out", tmp_path / out)
        summary = json.loads((tmp_path / out / "summary.json").read_text())
        numbers.append((summary["test_elbo"], summary["test_log_evidence"]))
    assert numbers[0] == numbers[1] != numbers[2]


def test_the_command_on_the_whole_of_mnist(tmp_path):
    """In its own process, as a user runs it, from another folder and into an empty cache."""
    options = "--hidden-dim 32 --latent-dim 5 --epochs 2 --batch-size 500 --num-samples 5 --threads 1"
    ran = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLES / "mnist_svi.py", *options.split(), "--out", "out"],
        cwd=tmp_path,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "epoch   2 " in ran.stdout
    assert "epoch 2/2" not in ran.stderr  # no progress bar outside of a terminal
    assert list(tmp_path.glob("cache/**/train-images-idx3-ubyte"))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert -240 < summary["test_elbo"] < -150
