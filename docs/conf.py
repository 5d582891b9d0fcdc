"""Sphinx: pages in MyST, the reference from the docstrings, the results from JSON records."""

import json
import runpy
from pathlib import Path

import pyro_vae

project = "pyro_vae"
author = "The pyro_vae authors"
project_copyright = author
version = release = pyro_vae.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
myst_enable_extensions = ["dollarmath", "substitution"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "pyro_vae"

napoleon_numpy_docstring = False
autodoc_member_order = "bysource"
maximum_signature_line_length = 88

# A role in a docstring that names nothing of this package is an error; other packages' names are
# printed without a link, since a link would take their inventories from the network.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|torchvision|pyro|matplotlib|collections|pathlib|typing|abc)\..*"),
    (r"py:.*", r"(Tensor|Figure|ELBO|PyroOptim|TorchDistribution|nn\.Module|Path|optional|Any)"),
    (r"py:.*", r"(pyro_vae\.)?(pairs\.Batch|pairs\.Program|comparison\.Loss|Batch|Program|Loss)"),
]


def read_records(folder: Path) -> dict[str, dict]:
    """The runs on record: those JSON files that say which command made them."""
    found = {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}
    return {name: record for name, record in found.items() if "command" in record}


def results_page(records: dict[str, dict]) -> str:
    """One table of the numbers on test data, and below it each run's command and settings."""
    if not records:
        return "There are no runs on record."
    numbers = ["test_elbo", "test_reconstruction", "test_kl", "test_log_evidence"]
    lines = [
        "| run | likelihood | data, protocol | unit | ELBO | reconstruction | KL | log p(x) >= |",
        "|---|---|---|---|---:|---:|---:|---:|",
    ]
    details = []
    for name, record in records.items():
        if set(numbers) <= record.keys():
            bounds = record.get("log_sigma_bounds")
            likelihood = record["likelihood"] + (f", log sigma in {tuple(bounds)}" if bounds else "")
            cells = [name, likelihood, f"{record['dataset']}, {record['protocol']}", record["unit"]]
            cells += [f"{record[number]:.2f}" for number in numbers]
            cells[-1] += f" ({record['num_samples']} samples)"
            lines.append("| " + " | ".join(cells) + " |")
        settings = {k: v for k, v in record.items() if k not in [*numbers, "command"] and not _is_table(v)}
        details += [f"**{name}**", "", "```sh", record["command"], "```", ""]
        details += ["; ".join(f"{k}: {_plain(v)}" for k, v in settings.items()) + ".", ""]
        details += [*_table(record.get("rows", [])), ""]
    table = lines if len(lines) > 2 else []
    return "\n".join([*table, "", *details])


def _table(rows: list[dict]) -> list[str]:
    """The rows of a record as they are, a column a field."""
    if not rows:
        return []
    fields = list(rows[0])
    rule = "|" + "|".join("---" if isinstance(rows[0][field], str) else "---:" for field in fields) + "|"
    cells = [[_plain(row[field]) for field in fields] for row in rows]
    return (
        ["| " + " | ".join(line) + " |" for line in [fields]]
        + [rule]
        + ["| " + " | ".join(line) + " |" for line in cells]
    )


def _is_table(value: object) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _plain(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


myst_substitutions = {"results": results_page(read_records(Path(__file__).parent / "results"))}


# What examples/compare_elbos.py wrote has a page of its own, with figures that the example draws.


def comparison(record: dict) -> dict[str, str]:
    """The run, the tables and the figures of the page "Comparing ELBO estimators"."""
    root = Path(__file__).parent
    folder = root / "_build" / "compare"
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in runpy.run_path(str(root.parent / "examples" / "compare_elbos.py"))["figures"](
        record
    ).items():
        figure.savefig(folder / f"{name}.png", bbox_inches="tight")
    settings = "; ".join(
        f"{k}: {_plain(v)}" for k, v in record.items() if k != "command" and not _is_table(v)
    )
    run = f"```sh\n{record['command']}\n```\n\n{settings}."
    late = [r for r in record["comparison"] if r["stage"] == record["stages"][-1]["stage"]]
    rows = []
    for r in late:
        if r["group"] == "guide":
            name = {"estimator": r["estimator"], "particles": r["particles"]}
            model = next(m for m in late if m["group"] == "model" and name.items() <= m.items())
            rows.append(
                {
                    "estimator": r["estimator"],
                    "k": r["particles"],
                    "gap": f"{r['gap']:.2f} ± {r['gap_error']:.2f}",
                    "ms": f"{r['ms']:.1f}",
                    "SNR model": f"{model['snr']:.3f}",
                    "SNR guide": f"{r['snr']:.3f}",
                    "SNR/√s model": f"{model['snr_per_root_second']:.2f}",
                    "SNR/√s guide": f"{r['snr_per_root_second']:.2f}",
                    "variance guide": f"{r['gradient_variance']:.4g}",
                }
            )
    last = {(r["estimator"], r["particles"]): r for r in record["training"]}
    trained = [
        {
            "estimator": r["estimator"],
            "k": r["particles"],
            "steps": r["steps"],
            "seconds": f"{r['seconds']:.1f}",
            "log p(x) >=": f"{r['log_evidence']:.2f}",
        }
        for r in last.values()
    ]
    tables = {"compare_late": rows, "compare_training": trained}
    return {"compare_run": run, **{name: "\n".join(_table(table)) for name, table in tables.items()}}


for record in read_records(Path(__file__).parent / "results").values():
    if "comparison" in record:
        myst_substitutions |= comparison(record)
