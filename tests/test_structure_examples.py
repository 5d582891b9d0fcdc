"""The examples of priors, posteriors, convolutions, missing pixels, and a benchmark, with tiny settings."""

import json
import math
import re
import runpy
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

import pyro_vae as pv

ROOT = Path(__file__).parents[1]
TINY = ["--epochs", 1, "--latent-dim", 4, "--images", 30, "--num-samples", 5]
DENSE = [*TINY, "--hidden-dim", 8]
GAPS = ["--gap-images", 2, "--steps", 2]


def run(monkeypatch, script, *options):
    monkeypatch.setattr(sys, "argv", [script, *map(str, options)])
    return runpy.run_path(str(ROOT / script), run_name="__main__")


pytestmark = pytest.mark.usefixtures("few")


@pytest.mark.parametrize(
    ("script", "options", "pictures"),
    [
        ("priors", [*DENSE, "--prior", "normal"], ["samples"]),
        ("priors", [*DENSE, "--prior", "mixture", "--components", 5], ["samples"]),
        ("priors", [*DENSE, "--prior", "vamp", "--components", 5], ["samples", "pseudo_inputs"]),
        ("priors", [*DENSE, "--prior", "flow"], ["samples"]),
        ("posteriors", [*DENSE, *GAPS, "--posterior", "factorised"], ["samples", "reconstructions"]),
        ("posteriors", [*DENSE, *GAPS, "--posterior", "full"], ["samples", "reconstructions"]),
        ("posteriors", [*DENSE, *GAPS, "--posterior", "flow"], ["samples", "reconstructions"]),
        ("convolutional", [*TINY, "--channels", 2, 3], ["samples", "traversals", "interpolations"]),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else value,
)
@pytest.mark.filterwarnings("ignore:Posterior collapse")
def test_an_example_runs(script, options, pictures, monkeypatch, tmp_path, capsys):
    run(monkeypatch, f"examples/{script}.py", *options, "--out", tmp_path / "out")
    shown = " ".join(capsys.readouterr().out.split())
    assert re.search("dynamic binarisation, log mass in nats per data point", shown)
    assert script != "posteriors" or "gap of 2 images" in shown
    assert re.search(r"log p\(x\) at least -\d+\.\d\d \(30 images, 5 importance samples\)", shown)
    torch.load(tmp_path / "out" / "weights.pt", weights_only=True)
    for name in pictures:
        assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_example_of_missing_pixels_runs(monkeypatch, tmp_path, capsys):
    options = [*DENSE, "--particles", 2, "--share", 0.3, "--out", tmp_path]
    run(monkeypatch, "examples/missing.py", *options)
    shown = " ".join(capsys.readouterr().out.split())
    found = re.search(r"-log p\(lower half \| upper half\) = (\S+) ± (\S+) nats per data point", shown)
    assert "static binarisation" in shown
    assert "30 images" in shown
    assert "30% of the pixels missing, seed 0" in shown
    record = json.loads((tmp_path / "summary.json").read_text())
    assert float(found[1]) == pytest.approx(-record["log_p_lower_given_upper"], abs=0.01)
    assert float(found[2]) == pytest.approx(record["standard_error"], abs=0.01)
    assert (tmp_path / "completions.png").read_bytes().startswith(b"\x89PNG")
    torch.load(tmp_path / "weights.pt", weights_only=True)


def test_the_benchmark_continues_an_interrupted_run(monkeypatch, tmp_path, capsys):
    script, record = "benchmarks/structures.py", tmp_path / "record.json"
    eager = pv.CompiledELBO
    monkeypatch.setattr(pv, "CompiledELBO", lambda elbo: eager(elbo, backend="eager"))
    names = ["factorised", "full covariance", "flow posterior", "MixturePrior", "VampPrior", "FlowPrior"]
    module = runpy.run_path(str(ROOT / script), run_name="structures")
    assert list(module["STRUCTURES"])[:6] == names
    structures = module["STRUCTURES"]
    for name in list(structures)[2:]:
        structures.pop(name)
    options = {"epochs": 1, "seed": 0, "images": 20, "num_samples": 3, "out": record, "runs": tmp_path}
    parsed = Namespace(**options)
    module["main"](parsed)
    rows = json.loads(record.read_text())["rows"]
    assert [row["structure"] for row in rows] == names[:2]
    assert rows[0]["ahead of the first"] == "+0.00 ± 0.00"
    assert "factorised: epoch" in capsys.readouterr().out
    rows[0]["KL"] = 0.125  # so that another run would show
    record.write_text(json.dumps({**json.loads(record.read_text()), "rows": rows[:1]}))
    module["main"](parsed)
    again = json.loads(record.read_text())["rows"]
    assert again[0] == rows[0]
    assert again[1]["log p(x) >="] == rows[1]["log p(x) >="]
    assert "factorised: epoch" not in capsys.readouterr().out
    parsed.epochs = 2
    with pytest.raises(SystemExit, match="expected the settings of this run.*has others"):
        module["main"](parsed)


def test_both_autoencoders_are_measured_and_drawn(monkeypatch, tmp_path):
    options = ["--latent-dims", 2, 3, "--hidden-dim", 8, "--epochs", 2, "--seeds", 2, "--images", 20]
    run(monkeypatch, "examples/autoencoder.py", *options, "--num-samples", 5, "--out", tmp_path)
    record = json.loads((tmp_path / "summary.json").read_text())
    floor, *rows = record["rows"]
    assert [(row["model"], row["latents"]) for row in rows] == [
        (name, latents) for latents in (2, 3) for name in ("autoencoder", "VAE")
    ]
    for row in rows:
        assert -560 < row["reconstruction"] < -100
        assert row["distance, z ~ N(0, I)"] > floor["distance"] > 0
        assert ("log p(x) >=" in row) == (row["model"] == "VAE")
    for name in ("images", "codes"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_the_frechet_distance_is_the_closed_form(dim, monkeypatch):
    """|m - n|^2 + tr(S + T) - 2 sum sqrt(eigenvalues of S T), with Gaussians whose moments are exact."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    frechet = runpy.run_path(str(ROOT / "examples/autoencoder.py"))["frechet"]
    x = torch.randn(100, dim, dtype=torch.double)
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.atleast_2d(x.T.cov()))).T
    (one, other), (m, n) = torch.randn(2, dim, dim).double(), torch.randn(2, dim).double()
    roots = torch.linalg.eigvals(one @ one.T @ other @ other.T).real.clamp(min=0).sqrt()
    expected = (m - n).square().sum() + one.square().sum() + other.square().sum() - 2 * roots.sum()
    assert frechet(x @ one.T + m, x @ other.T + n) == pytest.approx(expected.item(), rel=1e-6)
    assert frechet(x, x) == pytest.approx(0, abs=1e-9)


@pytest.mark.filterwarnings("ignore:Posterior collapse")
def test_the_likelihoods_are_compared_and_drawn(monkeypatch, tmp_path):
    options = ["--latent-dim", 3, "--hidden-dim", 8, "--epochs", 1, "--images", 20, "--num-samples", 5]
    run(monkeypatch, "examples/likelihoods.py", *options, "--out", tmp_path)
    rows = {row["likelihood"]: row for row in json.loads((tmp_path / "summary.json").read_text())["rows"]}
    assert len(rows) == 9
    for row in rows.values():
        assert row["ELBO"] == pytest.approx(row["reconstruction"] - row["KL"], rel=1e-6, abs=0.02)
        assert 0 <= row["active dimensions"] <= 3
        levels_of_density = 256 if row["log of a"] == "density" else 1
        bits = math.log2(levels_of_density) - row["log p(x) >="] / (784 * math.log(2))
        assert row["bits per dimension"] == pytest.approx(bits, abs=1e-3)
    squares = rows["Gaussian, mean of squares"]
    assert squares["reconstruction"] == pytest.approx(-392 * math.log(784 * math.pi) - 0.1, abs=0.2)
    assert (tmp_path / "likelihoods.png").read_bytes().startswith(b"\x89PNG")
