"""The example on MNIST with the embedded data; the command line that all examples share."""

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

EXAMPLES = Path(__file__).parents[1] / "examples"
SHARED = EXAMPLES / "command_line.py"
SCRIPTS = [file.stem for file in sorted(EXAMPLES.glob("*.py")) if file != SHARED]
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


# The plain VAE on MNIST.


@pytest.mark.parametrize("elbo", ["trace", "mean-field"])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
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
    assert summary["unit"] == f"nats a datum, log {kind}"
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
        f"test, {protocol}, log {kind} in nats a datum: ELBO {elbo} = reconstruction {reconstruction} - "
        f"KL {kl}, log p(x) at least {evidence} (5 importance samples)"
    )

    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert rows[1]["loss"] < rows[0]["loss"]
    weights = torch.load(out / "weights.pt", weights_only=True)
    assert weights["model"]["decoder.0.0.weight"].shape == (16, 3)
    for name in PICTURES:
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")


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


# The command line, which all scripts share. A refusal is one line and exit status 2.


def refused(monkeypatch, capsys, script, *options, status=2):
    """The one line with which a script ends."""
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, script, *options)
    assert stop.value.code == status
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"{script}.py: ")
    return line


# type of an option -> what its message says, and the values that it refuses
BAD = {
    "count": ("expected a positive whole number, got", ["0", "-10", "1.5", "x", ""]),
    "positive": ("", ["0", "-1", "inf", "nan", "x"]),
    "learning_rate": ("", ["0", "1", "-0.1", "nan", "fast"]),
    "seed": ("", ["-1", str(2**64), "1.5", "a"]),
    "device": ("cannot be used", ["tpu9", "cuda:99"]),
}


def typed_options(script):
    """The options of a script, those shared by all among them, each with its type."""
    text = (EXAMPLES / f"{script}.py").read_text() + SHARED.read_text()
    found = re.findall(r'add_argument\(\s*"(--[\w-]+)", type=(\w+)', text)
    return [(option, kind) for option, kind in found if kind in BAD]


OPTIONS = [(script, *option) for script in SCRIPTS for option in typed_options(script)]


@pytest.mark.parametrize(("script", "option", "kind"), OPTIONS)
def test_a_bad_value_is_refused_before_the_data_are_read(script, option, kind, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(pv.data, "load", None)
    says, values = BAD[kind]
    for value in values:
        given = [value, value] if option == "--channels" else [value]  # which takes two
        line = refused(monkeypatch, capsys, script, option, *given, "--out", tmp_path / "out")
        assert f"argument {option}: " in line
        assert says in line
        assert repr(value) in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_number_of_a_command_line_is_checked(script):
    assert {"--seed", "--num-samples"} <= {option for name, option, _ in OPTIONS if name == script}
    assert not re.search(r"type=(int|float)\b", (EXAMPLES / f"{script}.py").read_text())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--likelihood", "poisson"], "invalid choice: 'poisson'"),
        (["--elbo", "renyi"], "invalid choice"),
        (["--dataset", "cifar"], "fashion-mnist"),
        (["--lr", "0"], "expected 0 < lr < 1, got '0'"),
        (["--lr", "nan"], "expected 0 < lr < 1, got 'nan'"),
        (["--seed", "-1"], "expected 0 <= seed < 2**63, got '-1'"),
        (["--nonsense"], "unrecognized arguments"),
    ],
)
def test_a_bad_option_is_one_line_and_exit_2(options, message, monkeypatch, tmp_path, capsys):
    assert message in refused(monkeypatch, capsys, "mnist_svi", *options, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_out_that_cannot_be_written_is_refused_before_the_data_are_read(
    script, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(pv.data, "load", None)
    (tmp_path / "file").write_text("kept")
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        line = refused(monkeypatch, capsys, script, "--out", out)
        assert f"--out: expected a folder that can be written, got {str(out)!r}" in line
    monkeypatch.setattr(os, "access", lambda *_: False)  # chmod does not stop root
    assert "expected a folder that can be written" in refused(monkeypatch, capsys, script, "--out", tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ValueError("a file\nis damaged"), 2, "error: a file is damaged"),
        (OSError("the disk is full"), 2, "error: the disk is full"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_or_ctrl_c_is_one_line(script, error, status, message, monkeypatch, tmp_path, capsys):
    def load(*_, **__):
        raise error

    monkeypatch.setattr(pv.data, "load", load)
    out = tmp_path / "out"
    assert refused(monkeypatch, capsys, script, "--out", out, status=status) == f"{script}.py: {message}"
    assert not out.exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_the_commands_and_every_option(script, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, script, "--help")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert f"python examples/{script}.py" in shown
    for option, _ in typed_options(script):
        assert option in shown


def test_a_damaged_data_file_is_one_line_and_exit_2(monkeypatch, tmp_path, capsys):
    pv.data.load(root=tmp_path)
    (file,) = tmp_path.glob("MNIST/raw/train-images*")
    damaged = bytearray(file.read_bytes())
    damaged[1000] ^= 1
    file.write_bytes(damaged)
    options = ["--data-root", tmp_path, "--out", tmp_path / "out"]
    error = refused(monkeypatch, capsys, "mnist_svi", *options)
    assert "train-images-idx3-ubyte: expected MD5" in error
    assert "The file is damaged" in error
