"""The example's command line, on the embedded data; what every example refuses at once."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pyro_vae as pv

SCRIPT = Path(__file__).parents[1] / "examples" / "mnist_svi.py"
LIKELIHOODS = {
    "bernoulli": ("dynamic binarisation", "mass", None),
    "gaussian": ("grey pixels", "density", None),
    "gaussian-learned": ("grey pixels", "density", [-6.0, 2.0]),
    "continuous-bernoulli": ("grey pixels", "density", None),
    "categorical": ("8 grey levels", "mass", None),
    "discretized-logistic": ("256 grey levels", "mass", [-6.0, 2.0]),
}
PICTURES = ["learning_curves", "reconstructions", "samples", "latent_plane"]


def run(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, options)])
    return runpy.run_path(str(SCRIPT), run_name="__main__")


@pytest.mark.parametrize("elbo", ["trace", "mean-field"])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_every_likelihood_with_every_elbo(likelihood, elbo, few, monkeypatch, tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    options = ["--likelihood", likelihood, "--elbo", elbo, "--hidden-dim", 16, "--latent-dim", 3]
    run(monkeypatch, *options, "--epochs", 2, "--batch-size", 50, "--num-samples", 5, "--out", out)
    shown = capsys.readouterr().out
    protocol, kind, bounds = LIKELIHOODS[likelihood]
    assert protocol in shown
    assert f"log {kind} in nats a datum" in shown
    assert str(out) in shown

    summary = json.loads((out / "summary.json").read_text())
    assert summary["likelihood"] == likelihood
    assert summary["elbo"] == elbo
    assert summary["protocol"] == protocol
    assert summary["unit"] == f"nats a datum, log {kind}"
    assert summary["log_sigma_bounds"] == bounds
    assert (summary["seed"], summary["epochs"], summary["num_samples"]) == (0, 2, 5)
    assert summary["seconds"] > 0
    parts = summary["test_reconstruction"] - summary["test_kl"]
    assert summary["test_elbo"] == pytest.approx(parts, rel=1e-4)
    assert summary["test_log_evidence"] > summary["test_elbo"] - 1

    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert rows[1]["loss"] < rows[0]["loss"]
    weights = torch.load(out / "weights.pt", weights_only=True)
    assert weights["model"]["decoder.0.0.weight"].shape == (16, 3)
    for name in PICTURES:
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_kind_of_log_probability_is_that_of_the_support():
    """What the example says of each likelihood, against the distribution itself."""
    module = runpy.run_path(str(SCRIPT))
    for family, _, kind in module["LIKELIHOODS"].values():
        support = family(torch.zeros(family.num_features(4))).support
        assert support.is_discrete == (kind == "mass")


def test_a_plane_of_two_dimensions_has_its_manifold(few, monkeypatch, tmp_path):
    options = ["--hidden-dim", 8, "--latent-dim", 2, "--epochs", 1, "--num-samples", 1]
    run(monkeypatch, *options, "--out", tmp_path)
    assert (tmp_path / "manifold.png").exists()


@pytest.mark.filterwarnings("default")  # torch 2.11's compiler uses what torch deprecates
def test_compiled_and_in_reduced_precision(few, monkeypatch, tmp_path):
    options = ["--hidden-dim", 32, "--latent-dim", 3, "--epochs", 2, "--batch-size", 100, "--num-samples", 5]
    found = {}
    for name, more in (
        ("plain", []),
        ("compiled", ["--compiled"]),
        ("reduced", ["--compiled", "--bfloat16"]),
    ):
        run(monkeypatch, *options, *more, "--out", tmp_path / name)
        found[name] = json.loads((tmp_path / name / "summary.json").read_text())["test_elbo"]
    assert found["compiled"] == pytest.approx(found["plain"], rel=1e-4)
    assert found["reduced"] == pytest.approx(found["plain"], rel=1e-2)
    assert found["reduced"] != found["compiled"]


def test_a_seed_gives_the_same_numbers(few, monkeypatch, tmp_path):
    options = ["--hidden-dim", 8, "--latent-dim", 3, "--epochs", 1, "--num-samples", 2]
    numbers = []
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(monkeypatch, *options, "--seed", seed, "--out", tmp_path / out)
        summary = json.loads((tmp_path / out / "summary.json").read_text())
        numbers.append((summary["test_elbo"], summary["test_log_evidence"]))
    assert numbers[0] == numbers[1] != numbers[2]


def test_the_command_on_the_whole_of_mnist(tmp_path):
    """In a process of its own, as a user runs it, into an empty cache."""
    options = "--hidden-dim 32 --latent-dim 5 --epochs 2 --batch-size 500 --num-samples 5 --threads 1"
    ran = subprocess.run(
        [sys.executable, "-W", "error", SCRIPT, *options.split(), "--out", "out"],
        cwd=tmp_path,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "epoch 2/2" in ran.stderr  # the progress bar
    assert list(tmp_path.glob("cache/**/train-images-idx3-ubyte"))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert -240 < summary["test_elbo"] < -150


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--likelihood", "poisson"], "invalid choice: 'poisson'"),
        (["--elbo", "renyi"], "invalid choice"),
        (["--dataset", "cifar"], "fashion-mnist"),
        (["--latent-dim", "0"], "--latent-dim: expected a positive whole number, got '0'"),
        (["--hidden-dim", "-3"], "expected"),
        (["--epochs", "1.5"], "--epochs: expected a positive whole number"),
        (["--batch-size", "x"], "--batch-size: expected a positive whole number"),
        (["--num-samples", "0"], "--num-samples: expected a positive"),
        (["--threads", "0"], "--threads: expected a positive"),
        (["--lr", "0"], "expected 0 < lr < 1"),
        (["--lr", "nan"], "expected 0 < lr < 1"),
        (["--lr", "fast"], "--lr"),
        (["--seed", "a"], "--seed"),
        (["--seed", "-1"], "0 <= seed < 2**63"),
        (["--seed", str(2**64)], "0 <= seed < 2**63"),
        (["--device", "tpu9"], "'tpu9' cannot be used"),
        (["--nonsense"], "unrecognized arguments"),
    ],
)
def test_a_bad_option_is_one_line_and_exit_2(options, message, monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *options, "--out", tmp_path / "out")
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


COUNTS = [
    (file, option)
    for file in sorted(SCRIPT.parent.glob("*.py"))
    for option in ("--num-samples", "--epochs", "--plain-epochs")
    if f'"{option}"' in file.read_text()
]


@pytest.mark.parametrize(("script", "option"), COUNTS, ids=lambda value: getattr(value, "stem", value))
def test_a_count_of_none_is_refused_before_the_data_are_read(script, option, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(pv.data, "load", None)
    monkeypatch.setattr(sys, "argv", [str(script), option, "0", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(script), run_name="__main__")
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    assert re.search(rf"{option}\b.*: expected a positive whole number", error)


def test_an_out_that_is_a_file_is_one_line_and_exit_2(few, monkeypatch, tmp_path, capsys):
    (tmp_path / "out").write_text("kept")
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "--epochs", "1", "--out", tmp_path / "out")
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert (tmp_path / "out").read_text() == "kept"


def test_a_damaged_data_file_is_one_line_and_exit_2(monkeypatch, tmp_path, capsys):
    pv.data.load(root=tmp_path)
    (file,) = tmp_path.glob("MNIST/raw/train-images*")
    damaged = bytearray(file.read_bytes())
    damaged[1000] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "--data-root", tmp_path, "--out", tmp_path / "out")
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert "train-images-idx3-ubyte is damaged" in error
    assert len(error.strip().splitlines()) == 1
