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


def test_the_benchmark_continues_an_interrupted_run(few, monkeypatch, tmp_path, capsys):
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
    options = ["--hidden-dim", 8, "--epochs", 2, "--seeds", 2, "--images", 20, "--num-samples", 5]
    run(monkeypatch, "examples/autoencoder.py", *options, "--out", tmp_path)
    rows = json.loads((tmp_path / "summary.json").read_text())["rows"]
    assert len(rows) == 2 * 2 * 9  # seeds, sizes; real images, two models, three sources of z for each
    assert {(row["seed"], row["latent_dim"]) for row in rows} == {(0, 2), (0, 20), (1, 2), (1, 20)}
    for row in rows:
        if row["of"] == "autoencoder":
            assert row.keys() == {"latent_dim", "seed", "of", "reconstruction", "spread"}
            assert -560 < row["reconstruction"] < -100
        elif row["of"] == "VAE":
            assert row["log_evidence"] > row["elbo"] - 5
            assert row["reconstruction"] > row["elbo"]
            assert row["kl"] > 0
        else:
            assert row["frechet"] > 0
            assert 0 < row["entropy"] < math.log(10)
    for name in ("planes", "samples", "interpolations"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def example(monkeypatch):
    """The functions of an example."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return lambda name: runpy.run_path(str(ROOT / f"examples/{name}.py"))


def with_moments(mean, covariance):
    """Rows whose mean and covariance are these, up to rounding."""
    e = torch.randn(100, len(mean), dtype=torch.double)
    e = (e - e.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(e.T.cov())).T
    return e @ torch.linalg.cholesky(covariance).T + mean


def test_the_frechet_distance_along_common_axes(example):
    """|m - n|^2 + sum_i (s_i - t_i)^2, with standard deviations s, t along the same rotated axes."""
    axes, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.double))
    s, t = torch.rand(2, 5, dtype=torch.double) + 0.1
    m, n = torch.randn(2, 5, dtype=torch.double)
    a, b = with_moments(m, axes * s**2 @ axes.T), with_moments(n, axes * t**2 @ axes.T)
    expected = (m - n).square().sum() + (s - t).square().sum()
    frechet = example("judge")["frechet"]
    assert frechet(a, b) == pytest.approx(expected.item(), rel=1e-9)
    assert frechet(a, a.flip(0)) == pytest.approx(0, abs=1e-9)


def test_the_frechet_distance_in_two_dimensions(example):
    """tr (S T)^(1/2) = (tr S T + 2 (det S T)^(1/2))^(1/2), also where S and T do not commute."""
    s, t = (root @ root.T for root in torch.randn(2, 2, 2, dtype=torch.double))
    zero = torch.zeros(2, dtype=torch.double)
    root = ((s @ t).trace() + 2 * (s @ t).det().sqrt()).sqrt()
    expected = s.trace() + t.trace() - 2 * root
    assert example("judge")["frechet"](with_moments(zero, s), with_moments(zero, t)) == pytest.approx(
        expected.item(), rel=1e-6
    )


def test_a_classifier_that_knows_nothing_has_the_entropy_of_ten_digits(example):
    classifier = torch.nn.Sequential(torch.nn.Linear(784, 3), torch.nn.Linear(3, 10))
    for parameter in classifier[1].parameters():
        parameter.data.zero_()
    x = torch.rand(50, 784)
    judged = example("judge")["judge"](classifier, x, x)
    assert judged["entropy"] == pytest.approx(math.log(10), rel=1e-5)
    assert judged["frechet"] == pytest.approx(0, abs=1e-6)


def test_the_fitted_gaussian_has_the_moments_of_the_codes(example):
    codes = torch.randn(200, 2) @ torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.5, 1.0]]) + 3  # in a plane of R^3
    drawn = example("autoencoder")["draw_fitted"](codes, 200_000)
    torch.testing.assert_close(drawn.mean(0), codes.mean(0), atol=0.03, rtol=0)
    torch.testing.assert_close(drawn.T.cov(), codes.T.cov(), atol=0.06, rtol=0)
    normal = torch.linalg.svd(codes - codes.mean(0)).Vh[2]
    assert ((drawn - codes.mean(0)) @ normal).abs().max() < 1e-4


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
