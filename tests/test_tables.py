"""Results as tables, in print and in a notebook: short, with their unit, and with every text escaped."""

import math
from xml.etree import ElementTree

import pytest
import torch

import pyro_vae as pv
from pyro_vae.table import Table


def cells(result):
    """The captions, the rows of text, and the notes of a table."""
    root = ElementTree.fromstring(f"<body>{result._repr_html_()}</body>")  # well formed, or this raises
    rows = [[cell.text or "" for cell in row] for row in root.iter("tr")]
    found = [c.text for c in root.iter("caption")], rows, [p.text for p in root.iter("p")]
    # The same in print, without the lines between head and rows and the spaces that align a column.
    printed = [" ".join(line.split()) for line in str(result).splitlines() if line.strip("- ")]
    shown = [*found[0], *(" ".join(filter(None, row)) for row in rows), *found[2]]
    assert sorted(printed) == sorted(shown)
    return found


def test_numbers_are_on_the_right_and_texts_on_the_left():
    head, *rows = (
        ("name", "number", "text"),
        ("a", "-2.5 ± 0.1", "8 | 2"),
        ("longer", "", ""),
        ("b", "inf", "x"),
    )
    assert str(Table("title", [head, *rows], ["note"])).splitlines() == [
        "title",
        "",
        "name        number  text",
        "-------------------------",
        "a       -2.5 ± 0.1  8 | 2",
        "longer",
        "b              inf  x",
        "",
        "note",
    ]


def test_elbo_terms_show_their_means():
    elbo = torch.linspace(-3, -1, 1001)
    captions, rows, _ = cells(pv.ELBOTerms(elbo, elbo + 5, torch.full((1001,), 5.0)))
    error = elbo.std().item() / math.sqrt(1001)
    assert captions == ["mean ± standard error over 1,001 data"]
    assert rows == [
        ["", "nats per data point"],
        ["ELBO", f"-2.000 ± {error:.3f}"],
        ["reconstruction, E[log p(x | z)]", f"3.000 ± {error:.3f}"],
        ["KL(q || p)", "5.000 ± 0.000"],
    ]


def test_log_evidence_shows_its_mean_and_both_errors():
    evidence = pv.LogEvidence(torch.tensor([-1.0, -2.0, -3.0, -2.0]), torch.full((4,), 0.2))
    _, rows, _ = cells(evidence)
    assert rows == [
        ["", "nats per data point"],
        ["log evidence, by importance weights", "-2.000 ± 0.408"],  # sqrt(2 / 3) / sqrt(4)
        ["Monte Carlo error of the mean", "0.100"],  # 0.2 / sqrt(4)
    ]


def test_what_has_no_error_shows_none():
    captions, rows, _ = cells(pv.LogEvidence(torch.tensor([-2.0]), torch.tensor([math.nan])))
    assert captions == ["mean ± standard error over 1 data"]
    assert rows[1:] == [["log evidence, by importance weights", "-2.000"]]


@pytest.mark.parametrize("evidence", [None, -1.5])
def test_a_comparison_shows_what_it_prints(evidence):
    record = {
        "estimator": "<a & b>",
        "particles": 2,
        "value": -3.0,
        "value_error": 0.25,
        "value_sd": 1.0,
        "gap": None,
        "bias": None,
        "ms": 4.0,
        "snr": 0.5,
        "snr_per_root_second": 8.0,
        "gradient_variance": 2.0,
        "gradient_bias": None,
    }
    records = [{**record, "group": "model"}, {**record, "group": "<guide>"}]
    compared = pv.Comparison(records, 50, 8, evidence)
    captions, rows, notes = cells(compared)
    lines = str(compared).splitlines()
    assert captions == [
        lines[0],
        "gradient of the loss per data point, model",
        "gradient of the loss per data point, <guide>",
    ]
    assert captions[0].startswith("nats per data point, 8 data, 50 draws of each")
    assert ["<a & b>", "2", "-3.000 ± 0.250", "1", "4"] in rows
    assert rows.count(["<a & b>", "2", "0.5", "8", "2"]) == 2
    assert notes == lines[-2:]
