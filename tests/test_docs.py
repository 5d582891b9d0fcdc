"""The pages hold: their code runs, their names exist, the picture of the house is the house."""

import ast
import importlib
import json
import math
import re
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

import pyro_vae as pv

ROOT = Path(__file__).parent.parent
PAGES = [
    "README.md",
    "docs/tutorial.md",
    "docs/likelihoods.md",
    "docs/autoencoder.md",
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
    "docs/missing.md",
    "docs/comparing.md",
    "docs/evidence.md",
    "docs/description.md",
    "docs/exercises.md",
    *sorted(page.relative_to(ROOT).as_posix() for page in (ROOT / "docs" / "howto").glob("*.md")),
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
    # As torchrun sets them for one process; port 0 is any free one.
    one = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    for name, value in one.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "page"}
    code = list(blocks(page))
    assert code
    for block in code:
        exec(compile(block, ROOT / page, "exec"), namespace)


def test_the_build_runs_the_tutorial_in_order(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "docs")
    tutorial = importlib.import_module("_tutorial")
    drawn = []

    def figure(names):
        drawn.append(names["a"])
        return Figure()

    monkeypatch.setattr(tutorial, "FIGURES", {"a_plot": figure})
    page = "```python\na = 1\n```\n\n![A](_build/tutorial/a_plot.png)\n\n```python\na += 1\nprint(a)\n```\n"
    written, names = tutorial.run(page, tmp_path)
    assert written == page + "\n```text\n2\n```\n"
    assert drawn == [1]
    assert names["a"] == 2
    assert (tmp_path / "a_plot.png").exists()


def test_every_figure_of_the_tutorial_is_drawn():
    page = (ROOT / "docs/tutorial.md").read_text()
    shown = re.findall(r"^!\[[^\]]*\]\(_build/tutorial/(\w+)\.png\)$", page, re.MULTILINE)
    saved = re.findall(r'savefig\("(\w+)\.png"\)', page)
    drawn = re.findall(r'^    "(\w+)": .*_figure', (ROOT / "docs/_tutorial.py").read_text(), re.MULTILINE)
    assert sorted(shown) == sorted(saved + drawn)


@pytest.mark.parametrize("page", [page for page in PAGES if "/howto/" in page])
def test_a_how_to_page_is_one_screen_of_public_names(page):
    text = (ROOT / page).read_text()
    assert len(text.splitlines()) <= 80
    assert set(re.findall(r"^(?:from|import) pyro_vae.*$", text, re.MULTILINE)) == {"import pyro_vae as pv"}


def test_the_description_of_the_package_stands_alone():
    """A package index shows no formulas, and has no other page of this repository."""
    text = (ROOT / "docs/description.md").read_text()
    assert not re.search(r"\]\((?!https://)|\$", text)


def test_there_is_one_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert pv.__version__ == project["version"]
    assert f'version: "{pv.__version__}"' in (ROOT / "CITATION.cff").read_text()


def test_the_workflow_runs_the_supported_versions():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    prefix = "Programming Language :: Python :: "
    supported = [line.removeprefix(prefix) for line in project["classifiers"] if line.startswith(prefix)]
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert f"python: {json.dumps(supported)}" in workflow
    assert project["requires-python"] == f">={supported[0]}"


def test_the_readme_has_the_two_commands():
    commands = re.findall(r"^pip install -e .* && .*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert commands == [
        "pip install -e . && python examples/mnist_svi.py",
        'pip install -e ".[test]" && pytest',
    ]


def test_the_readme_repeats_the_ratios_of_the_record():
    rows = json.loads((ROOT / "docs/results/steps.json").read_text())["rows"]
    compiled = [
        row for row in rows if row["threads"] == 1 and row["contender"] == "pyro_vae, compiled TraceMeanField"
    ]
    readme = " ".join((ROOT / "README.md").read_text().split())
    for column, of in (("x Pyro", "the time of `pyro.infer.SVI`'s"), ("x NumPyro", "NumPyro's")):
        ratios = [row[column] for row in compiled]
        assert f"{min(ratios):.2f} to {max(ratios):.2f} of {of}" in readme


def test_every_public_name_is_in_the_reference():
    reference = "\n".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    named = set(re.findall(r"pyro_vae\.(\w+)", reference))
    assert set(pv.__all__) <= named
    assert named - set(pv.__all__) == {"data_sets", "distributions", "elbos"}  # modules


NAMED = sorted(page.relative_to(ROOT).as_posix() for page in (ROOT / "docs").rglob("*.md"))


@pytest.mark.parametrize("page", ["README.md", *NAMED])
def test_names_on_a_page_exist(page):
    text = (ROOT / page).read_text()
    for name in re.findall(r"\bpv((?:\.\w+)+)", text):
        thing = pv
        for part in name.split(".")[1:]:
            assert hasattr(thing, part), f"pv{name}"
            thing = getattr(thing, part)
            if not isinstance(thing, type(pv)):
                break  # a method or a call's result


# The house.

PACKAGE = ROOT / "pyro_vae"
FILES = [file for file in sorted(PACKAGE.rglob("*.py")) if file.parent.name != "mnist"]


def imports(file):
    """The modules of the package that a file imports, as paths: 'svi', 'programs/pair'."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{file}: a relative import"
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "pyro_vae":
            inside = node.module.split(".")[1:]
            found |= {"/".join([*inside, alias.name]) for alias in node.names}
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            found |= {"/".join(name[1:]) for name in names if name[0] == "pyro_vae"}
    return found


def room(path):
    """The room of a path: 'programs/' for 'programs/pair', 'svi.py' for 'svi'."""
    first = path.split("/")[0]
    return f"{first}/" if (PACKAGE / first).is_dir() else f"{first}.py"


def stands_on():
    """Room -> the rooms that its files import."""
    found = {}
    for file in FILES:
        here = room(file.relative_to(PACKAGE).with_suffix("").as_posix())
        found.setdefault(here, set()).update({room(path) for path in imports(file) if path} - {here})
    return found


def tables():
    """Room -> (floor, the rooms that it stands on); the files that the page names inside folders."""
    page = (ROOT / "docs/architecture.md").read_text()
    rows = re.findall(r"^\| (\d) \| `(\w+(?:\.py|/))` \| [^|]* \| (.*) \|$", page, re.MULTILINE)
    rooms = {name: (int(floor), set(re.findall(r"`(\w+(?:\.py|/))`", below))) for floor, name, below in rows}
    return rooms, re.findall(r"^\| `([\w/]+/\w+\.py)` \|", page, re.MULTILINE)


def test_imports_run_down_the_floors():
    floors = {name: floor for name, (floor, _) in tables()[0].items()}
    assert floors.keys() == stands_on().keys()
    for name, below in stands_on().items():
        assert all(floors[other] < floors[name] for other in below), f"{name} imports {below}"


def test_the_table_says_what_a_room_stands_on():
    expected = {name: below for name, (_, below) in tables()[0].items() if name != "__init__.py"}
    assert expected == {name: below for name, below in stands_on().items() if name != "__init__.py"}


def test_the_page_names_every_file_in_a_folder_once():
    inside = [file.relative_to(PACKAGE).as_posix() for file in FILES if file.parent != PACKAGE]
    assert sorted(tables()[1]) == sorted(name for name in inside if not name.endswith("__init__.py"))


def test_no_file_is_imported_in_a_circle():
    modules = {file.relative_to(PACKAGE).with_suffix("").as_posix(): file for file in FILES}
    graph = {}
    for name, file in modules.items():
        graph[name] = set()
        for path in imports(file):
            # 'programs/pair/Pair' and 'programs/Pair' are names inside modules
            places = [path, path.rpartition("/")[0], f"{path.rpartition('/')[0]}/__init__"]
            graph[name] |= {next((place for place in places if place in modules), name)} - {name}
    assert list(TopologicalSorter(graph).static_order())  # raises CycleError


def test_a_file_is_one_idea_of_at_most_400_lines():
    assert {file.name for file in FILES if len(file.read_text().splitlines()) > 400} == set()
    for file in PACKAGE.glob("*/__init__.py"):
        sentence = ast.get_docstring(ast.parse(file.read_text()))
        assert sentence.count("\n") == 0, f"{file}: the idea of a folder is one sentence"


def test_examples_use_the_public_names_alone():
    for file in (ROOT / "examples").glob("*.py"):
        assert imports(file) <= {""}, file


def test_the_readme_s_numbers_are_those_on_record():
    record = json.loads((ROOT / "docs" / "results" / "default-run.json").read_text())
    readme = (ROOT / "README.md").read_text()
    assert record["command"] in readme
    for number in ("test_elbo", "test_log_evidence"):
        assert f"**{record[number]:.2f}**" in readme
    assert record["protocol"] in " ".join(readme.split())
    assert record["test_elbo"] > -97


# What the page on comparing states as a rule, in every seed and stage of every pair.
RULES = [
    "`MeanField` has a quieter guide gradient than `Trace_ELBO`",
    "`Trace_ELBO` and `STL` have the same model gradient",
    "`TraceGraph_ELBO` is `Trace_ELBO`",
    "`TraceMeanField_ELBO` is `MeanField`",
    "`RenyiELBO(0)` is `IWAE`, k = 5",
    "the bound of `IWAE` is tighter at k = 50 than at 5",
]


def test_what_the_page_on_comparing_says_is_on_record(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    comparing = importlib.import_module("_comparing")
    folder = ROOT / "docs" / "results" / "compare"
    records = {name: json.loads((folder / f"{name}.json").read_text()) for name in comparing.PAIRS}
    for name, record in records.items():
        assert f"--pair {name}" in record["command"] or name == "bernoulli"
        assert {r["seed"] for r in record["comparison"]} == set(range(5))
        assert {r["stage"] for r in record["comparison"]} == {"early", "mid", "late"}
    counts = {row.pop("claim"): row for row in comparing.claims(records)}
    for rule in RULES:
        assert set(counts[rule].values()) <= {"15 of 15", "refused"}, (rule, counts[rule])
    for row in comparing.biases(records["linear-gaussian"]):
        for column in ("value", "gradient, model", "gradient, guide"):
            assert 0.3 < float(row[column].split()[0]) < 2, row
    assert list(records["two-layers"]["refused"]) == ["TraceMeanField_ELBO"]


def test_what_the_page_on_likelihoods_says_is_on_record(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    likelihoods = importlib.import_module("_likelihoods").likelihoods
    record = json.loads((ROOT / "docs" / "results" / "likelihoods.json").read_text())
    shown = likelihoods(record)
    for row in record["rows"]:
        assert (
            f"| {row['likelihood']} | {row['protocol']} | {row['log of a']} |" in shown["likelihoods_table"]
        )
        nats = -row["log p(x) >="] + (784 * math.log(256) if row["log of a"] == "density" else 0)
        assert row["bits per dimension"] == pytest.approx(nats / 784 / math.log(2), abs=1e-3)
    record["rows"][0]["KL"] = 1.0  # no collapse
    with pytest.raises(ValueError, match="expected that it shows this, got otherwise: .*collapses"):
        likelihoods(record)


def test_where_weights_are_to_be_trusted_annealing_agrees():
    record = json.loads((ROOT / "docs" / "results" / "annealed.json").read_text())
    trusted, others = record["agreement"]
    assert abs(trusted["mean"]) < 2 * trusted["error"]
    assert others["mean"] > 4 * others["error"]
    assert 0 < record["sandwich"]["upper - lower"]["mean"] < 0.05


def test_what_the_page_on_the_autoencoder_says_is_on_record(monkeypatch):
    """In each seed, not in the mean alone."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    values = importlib.import_module("_autoencoder").values
    record = json.loads((ROOT / "docs" / "results" / "autoencoder.json").read_text())
    assert record["command"] == "python examples/autoencoder.py"
    prior, fitted, codes = importlib.import_module("_autoencoder").SOURCES
    for latent in (2, 20):
        floor, *_ = both = values(record, latent, "real", "frechet")
        assert len(both) == record["seeds"] == 3
        order = [("VAE", fitted), ("VAE", prior), ("autoencoder", fitted), ("autoencoder", prior)]
        every = [values(record, latent, f"{model}, {source}", "frechet") for model, source in order]
        for distances in zip(*every, strict=True):
            assert list(distances) == sorted(distances)  # each is worse than the one before
        spread = [values(record, latent, model, "spread") for model in ("autoencoder", "VAE")]
        assert min(spread[0]) > 2 * max(spread[1])  # another scale
    assert max(values(record, 20, f"autoencoder, {codes}", "frechet")) < 2 * floor  # it reaches the floor
    better, worse = (values(record, 20, model, "reconstruction") for model in ("autoencoder", "VAE"))
    assert min(better) > max(worse)
    assert not values(record, 20, "autoencoder", "log_evidence")
