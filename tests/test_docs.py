"""The pages hold: their code runs, their names exist, the picture of the house is the house."""

import ast
import json
import re
from pathlib import Path

import pytest
import torch

import pyro_vae as pv

ROOT = Path(__file__).parent.parent
PAGES = [
    "README.md",
    "docs/tutorial.md",
    "docs/likelihoods.md",
    "docs/svi.md",
    "docs/data.md",
    "docs/compiled.md",
    "docs/hierarchical.md",
    "docs/mixture.md",
    "docs/semi_supervised.md",
    "docs/extending.md",
    "docs/priors.md",
    "docs/posteriors.md",
    "docs/convolutional.md",
    "docs/comparing.md",
]


def blocks(page):
    """The Python blocks of a page, each behind as many empty lines as stand before it."""
    text = (ROOT / page).read_text()
    for block in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield "\n" * text[: block.start(1)].count("\n") + block[1]


def few_images(name="mnist", *, train=True, root=None):
    generator = torch.Generator().manual_seed(int(train))
    pixels = torch.randint(256, (256 if train else 64, 784), dtype=torch.uint8, generator=generator)
    labels = torch.arange(len(pixels)) % 10
    return pv.data.Images(pixels, labels, name, (28, 28), tuple(map(str, range(10))))


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(page, monkeypatch, tmp_path):
    fit, log_evidence = pv.fit, pv.log_evidence
    monkeypatch.setattr(pv.data, "load", few_images)
    monkeypatch.setattr(
        pv, "fit", lambda svi, batches, epochs, **rest: fit(svi, batches, min(epochs, 2), **rest)
    )
    monkeypatch.setattr(
        pv, "log_evidence", lambda *args, num_samples: log_evidence(*args, min(num_samples, 5))
    )
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "page"}
    code = list(blocks(page))
    assert code
    for block in code:
        exec(compile(block, ROOT / page, "exec"), namespace)


def test_the_readme_has_the_two_commands():
    commands = re.findall(r"^pip install -e .* && .*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert commands == [
        "pip install -e . && python examples/mnist_svi.py",
        'pip install -e ".[test]" && pytest',
    ]


def test_every_public_name_is_in_the_reference():
    reference = (ROOT / "docs/api.md").read_text()
    named = set(re.findall(r"pyro_vae\.(\w+)", reference))
    assert set(pv.__all__) <= named
    assert named - set(pv.__all__) == {"distributions", "kl", "objectives"}  # what is said of all


@pytest.mark.parametrize("page", ["README.md", *(p.name for p in (ROOT / "docs").glob("*.md"))])
def test_names_on_a_page_exist(page):
    text = (ROOT / page if page == "README.md" else ROOT / "docs" / page).read_text()
    for name in re.findall(r"\bpv((?:\.\w+)+)", text):
        thing = pv
        for part in name.split(".")[1:]:
            assert hasattr(thing, part), f"pv{name}"
            thing = getattr(thing, part)
            if not isinstance(thing, type(pv)):
                break  # a method or a call's result


# The house.


def imports(file):
    """The rooms that a file of the package imports."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "pyro_vae":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pyro_vae."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            found |= {name[1] for name in names if name[0] == "pyro_vae" and len(name) > 1}
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{file}: a relative import"
    return found


ROOMS = {file.stem: imports(file) for file in (ROOT / "pyro_vae").glob("*.py")}


def table():
    """Room -> (floor, the rooms that it stands on), as docs/architecture.md says."""
    rows = re.findall(
        r"^\| (\d) \| `(\w+)\.py` \| .* \| (.*) \|$",
        (ROOT / "docs/architecture.md").read_text(),
        re.MULTILINE,
    )
    return {room: (int(floor), set(re.findall(r"`(\w+)\.py`", below))) for floor, room, below in rows}


def test_imports_run_down_the_floors():
    floors = {room: floor for room, (floor, _) in table().items()}
    assert floors.keys() == ROOMS.keys()
    for room, below in ROOMS.items():
        assert all(floors[other] < floors[room] for other in below), f"{room} imports {below}"


def test_the_table_says_what_a_room_stands_on():
    stands_on = {room: below for room, (_, below) in table().items() if room != "__init__"}
    assert stands_on == {room: below for room, below in ROOMS.items() if room != "__init__"}


def test_examples_use_the_public_names_alone():
    for file in (ROOT / "examples").glob("*.py"):
        assert not imports(file), file


def test_the_readme_s_numbers_are_those_on_record():
    record = json.loads((ROOT / "docs" / "results" / "default-run.json").read_text())
    readme = (ROOT / "README.md").read_text()
    assert record["command"] in readme
    for number in ("test_elbo", "test_log_evidence"):
        assert f"**{record[number]:.2f}**" in readme
    assert record["protocol"] in " ".join(readme.split())
    assert record["test_elbo"] > -97


def test_what_the_page_on_comparing_says_is_on_record():
    record = json.loads((ROOT / "docs" / "results" / "compare-elbos.json").read_text())
    rows = {(r["stage"], r["group"], r["estimator"], r["particles"]): r for r in record["comparison"]}
    few, some, many = record["particles"]
    stages = [stage["stage"] for stage in record["stages"]]
    assert stages == ["early", "mid", "late"]

    def noise(stage, name, k, field="gradient_variance", group="guide"):
        return rows[stage, group, name, k][field]

    for stage in stages:
        for k in (few, some, many):
            assert noise(stage, "STL", k) < noise(stage, "MeanField", k) < noise(stage, "Trace", k)
            assert noise(stage, "MeanField", k, "value_sd") > noise(stage, "Trace", k, "value_sd")
            assert noise(stage, "DReG", k, "snr") > noise(stage, "IWAE", k, "snr")
            costs = [r["ms"] for r in record["comparison"] if (r["stage"], r["particles"]) == (stage, k)]
            assert max(costs) < 1.5 * min(costs)
            for one, other in (("Trace", "MeanField"), ("Trace", "STL"), ("IWAE", "DReG")):
                same = noise(stage, other, k, group="model")
                assert noise(stage, one, k, group="model") == pytest.approx(same, rel=1e-3)
        for name in ("Trace", "MeanField", "STL"):
            growth = noise(stage, name, many, "snr") / noise(stage, name, few, "snr")
            assert growth == pytest.approx((many / few) ** 0.5, rel=0.1)
        for name in ("IWAE", "DReG"):
            assert noise(stage, name, many, "snr") < 1.1 * noise(stage, name, few, "snr")
            growth = noise(stage, name, many, "snr", "model") / noise(stage, name, few, "snr", "model")
            assert 1 < growth < 2.5
    assert noise("early", "IWAE", many, "snr") < 0.7 * noise("early", "IWAE", few, "snr")
    for field in ("value_sd", "gradient_variance"):
        ratios = [noise(s, "MeanField", few, field) / noise(s, "Trace", few, field) for s in stages]
        assert ratios == sorted(ratios), field

    trained = {(r["estimator"], r["particles"]): r for r in record["training"]}  # the last of each
    one, five = ([r for (_, k), r in trained.items() if k == at] for at in record["train_particles"])
    rounds = [
        record["training"][at : at + len(trained)] for at in range(0, len(record["training"]), len(trained))
    ]
    for taken in rounds:
        bounds = {
            k: [r["log_evidence"] for r in taken if r["particles"] == k] for k in record["train_particles"]
        }
        assert min(bounds[one[0]["particles"]]) > max(bounds[five[0]["particles"]])
    assert 1.8 < one[0]["steps"] / five[0]["steps"] < 2.3
    for same in (one, five):
        ends = [r["log_evidence"] for r in same]
        assert max(ends) - min(ends) < 1
