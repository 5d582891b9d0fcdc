"""The rows of Burda et al. on a few images: every objective and structure, its record, and its bounds."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from registry import each_once

import pyro_vae as pv

ROOT = Path(__file__).parents[1]
SCRIPT = str(ROOT / "examples" / "reproduce_iwae.py")
TINY = ["--hidden-dim", "8", "--epochs", "2", "--batch-size", "50", "--num-samples", "20"]

pytestmark = [pytest.mark.usefixtures("few"), pytest.mark.filterwarnings("ignore:Posterior collapse")]


def run(monkeypatch, out, *options):
    tiny = TINY[2:] if "--hidden-dim" in options else TINY
    monkeypatch.setattr(sys, "argv", [SCRIPT, *tiny, *options, "--out", str(out)])
    module = runpy.run_path(SCRIPT, run_name="__main__")
    return module, json.loads((out / "summary.json").read_text())


@pytest.mark.parametrize(
    ("layers", "objective"),
    [*each_once(["1", "2"], ["dreg", "stl"]), pytest.param("2", "iwae", marks=pytest.mark.proofs)],
)
def test_a_row_is_trained_and_recorded(layers, objective, monkeypatch, tmp_path, capsys):
    options = ["--layers", layers, "--objective", objective, "--k", "5"]
    module, record = run(monkeypatch, tmp_path, *options)
    assert record["protocol"] == "dynamic binarisation"
    assert record["passes"] == 2
    assert record["steps"] == 12
    assert -560 < record["test_elbo"] < record["test_log_evidence"] < -150
    assert record["standard_error"] > record["monte_carlo_error"] > 0
    assert list(record["active_units"]) == (["z"] if layers == "1" else ["z2", "z1"])
    shown = capsys.readouterr().out
    assert "2 passes, at least 0.0 minutes" in shown
    assert f"-log p(x) {-record['test_log_evidence']:.2f} ± {record['standard_error']:.2f} nats" in shown
    # the weights are those of the row
    mean = torch.full((784,), 0.5)
    model, guide = module["model_and_guide"](int(layers), "normal", 8, mean)
    saved = torch.load(tmp_path / "weights.pt", weights_only=True)
    model.load_state_dict(saved["model"])
    guide.load_state_dict(saved["guide"])
    x = pv.data.observe(pv.data.load(train=False), pv.data.DynamicBinarisation())
    assert pv.elbo_terms(model, guide, x).elbo.mean() == pytest.approx(record["test_elbo"], rel=0.01)


def test_a_stopped_row_goes_on_to_the_same_number(monkeypatch, tmp_path, capsys):
    _, whole = run(monkeypatch, tmp_path / "whole")
    fit = pv.fit

    def stopped(*args, **options):
        epochs = fit(*args, **options)
        yield next(epochs)
        next(epochs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pv, "fit", stopped)
        with pytest.raises(SystemExit):
            run(patch, tmp_path / "parts")
    capsys.readouterr()
    _, resumed = run(monkeypatch, tmp_path / "parts", "--resume")
    assert "parts: the training goes on after epoch 1\n" in capsys.readouterr().out
    same = [name for name in whole if name != "training_seconds"]
    assert {name: resumed[name] for name in same} == {name: whole[name] for name in same}
    run(monkeypatch, tmp_path / "parts", "--resume")
    assert "nothing is left to do" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("layers", "prior"), [("2", "vamp"), pytest.param("1", "flow", marks=pytest.mark.proofs)]
)
def test_the_top_prior_may_be_learned(layers, prior, monkeypatch, tmp_path):
    _, record = run(monkeypatch, tmp_path, "--layers", layers, "--prior", prior)
    assert -560 < record["test_log_evidence"] < -150


def test_the_measured_step_changes_nothing():
    module = runpy.run_path(SCRIPT)
    mean = torch.full((784,), 0.5)
    model, guide = module["model_and_guide"](1, "normal", 8, mean)
    torch.testing.assert_close(model(torch.zeros(2, 784)), torch.zeros(2, 784))
    before, state = [p.clone() for p in pv.parameters(model, guide)], torch.get_rng_state()
    loss = pv.CompiledELBO(pv.STL(), backend="eager")
    assert module["seconds_of_a_step"](loss, model, guide, [torch.zeros(5, 784)]) > 0
    assert torch.equal(torch.get_rng_state(), state)
    for parameter, was in zip(pv.parameters(model, guide), before, strict=True):
        assert torch.equal(parameter, was)
        assert parameter.grad is None


def test_weights_are_evaluated_to_the_number_of_their_row(monkeypatch, tmp_path, capsys):
    _, record = run(monkeypatch, tmp_path)
    line = [SCRIPT, *TINY, "--weights", str(tmp_path / "weights.pt"), "--out", str(tmp_path / "other")]
    monkeypatch.setattr(sys, "argv", line)
    capsys.readouterr()
    runpy.run_path(SCRIPT, run_name="__main__")
    shown = capsys.readouterr().out
    found = float(re.search(r"-log p\(x\) (\d+\.\d+)", shown)[1])
    assert found == pytest.approx(-record["test_log_evidence"], abs=0.5)  # other draws
    assert not (tmp_path / "other" / "summary.json").exists()


def test_weights_of_another_model_are_refused(monkeypatch, tmp_path, capsys):
    run(monkeypatch, tmp_path)
    other = ["--layers", "2", "--weights", str(tmp_path / "weights.pt"), "--out", str(tmp_path / "x")]
    line = [SCRIPT, *TINY, *other]
    monkeypatch.setattr(sys, "argv", line)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(SCRIPT, run_name="__main__")
    assert stop.value.code == 2
    assert "expected the weights of this model and guide" in capsys.readouterr().err


def test_the_weights_that_come_with_the_repository_load():
    module = runpy.run_path(SCRIPT)
    model, guide = module["model_and_guide"](1, "normal", 200, torch.full((784,), 0.5))
    module["load_weights"](ROOT / "examples" / "weights" / "iwae-1-layer.pt", model, guide)
    x = pv.data.observe(pv.data.load(train=False), pv.data.DynamicBinarisation())[:200]
    assert pv.elbo_terms(model, guide, x).elbo.mean() > -95


@pytest.mark.parametrize("layers", [1, 2])
def test_a_pair_starts_at_the_mean_of_the_data(layers):
    module = runpy.run_path(SCRIPT)
    mean = torch.linspace(0.01, 0.99, 784)
    model, guide = module["model_and_guide"](layers, "normal", 200, mean)
    torch.testing.assert_close(model.decoder(torch.zeros(1, 50 if layers == 1 else 100)).mean[0], mean)
    encoder = guide.encoder if layers == 1 else guide.lower
    assert encoder(mean[None]).mean.abs().max() < 1e-5


def test_the_page_shows_each_record_in_its_row_and_says_what_was_not_run(monkeypatch, tmp_path):
    iwae = runpy.run_path(str(ROOT / "docs" / "_iwae.py"))["iwae"]
    assert iwae(tmp_path)["iwae_table"].count("not run") == 20
    _, record = run(monkeypatch, tmp_path / "run", "--objective", "dreg")
    for name, changed in {
        "plain": {"layers": "2", "k": "5", "hidden_dim": 200},
        "single": {"hidden_dim": 200},  # DReG with one sample is STL
        "flow": {"prior": "flow"},
    }.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"command": f"run {name}"} | record | changed))
    parts = iwae(tmp_path)
    (row,) = [line for line in parts["iwae_table"].splitlines() if "2 layers, IWAE by DReG, k = 5 " in line]
    assert row.startswith("| 2 layers, IWAE by DReG, k = 5 | 83.89 | - | ")
    assert " ± " in row
    (row,) = [line for line in parts["iwae_table"].splitlines() if "1 layer, VAE by STL, k = 1 " in line]
    assert " ± " in row
    assert parts["iwae_table"].count("not run") == 18
    assert "flow prior, 8 units" in parts["iwae_beyond"]
    assert len(parts["iwae_sentences"].splitlines()) == 3
    assert all(f"run {name}" in parts["iwae_runs"] for name in ("plain", "single", "flow"))
