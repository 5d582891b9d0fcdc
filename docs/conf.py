"""Sphinx: pages in MyST, the reference from the docstrings, the results from JSON records."""

import json
import re
import runpy
import statistics
import textwrap
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator

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


# What benchmarks/run.py wrote has a page of its own.


def steps_tables(record: dict) -> str:
    """A table for each number of threads and size of batch."""
    rows, lines = record["rows"], []
    for threads, batch in dict.fromkeys((row["threads"], row["batch"]) for row in rows):
        at = [row for row in rows if (row["threads"], row["batch"]) == (threads, batch)]
        lines += [f"**Batch {batch}, {threads} thread{'s' * (threads > 1)}**", ""]
        lines += [*_table([_without(row, "threads", "batch") for row in at]), ""]
    return "\n".join(lines)


def training_tables(record: dict) -> str:
    """A table for each number of threads: the medians over the seeds."""
    rows, lines = record["rows"], []
    for threads in dict.fromkeys(row["threads"] for row in rows):
        at = [row for row in rows if row["threads"] == threads]
        seeds = ", ".join(str(seed) for seed in dict.fromkeys(row["seed"] for row in at))
        lines += [f"**Training, {threads} thread{'s' * (threads > 1)}, seeds {seeds}**", ""]
        merged = []
        for name in dict.fromkeys(row["contender"] for row in at):
            same = [_without(row, "threads", "seed", "contender") for row in at if row["contender"] == name]
            merged.append({"contender": name} | {key: _middle([row[key] for row in same]) for key in same[0]})
        lines += [*_table(merged), ""]
    return "\n".join(lines)


def growth_tables(record: dict) -> str:
    """The plot, and a table for each axis."""
    lines = [f"![Cost against each number]({draw_growth(record)})", ""]
    for axis, unit in dict.fromkeys((row["axis"], row["unit"]) for row in record["rows"]):
        rows = [row for row in record["rows"] if row["axis"] == axis]
        lines += [f"**{unit} against {axis}**", ""]
        table = {row["contender"]: {"contender": row["contender"]} for row in rows}
        for row in rows:
            table[row["contender"]][f"{row['value']:,}"] = row["time"]
        lines += [*_table(list(table.values())), ""]
    return "\n".join(lines)


def draw_growth(record: dict) -> str:
    """A panel for each axis, a line for each contender; where the picture lies."""
    axes = list(dict.fromkeys((row["axis"], row["unit"]) for row in record["rows"]))
    figure = Figure(figsize=(9, 7), layout="constrained")
    for panel, (axis, unit) in zip(figure.subplots(2, 2).flat, axes, strict=True):
        rows = [row for row in record["rows"] if row["axis"] == axis]
        for name in dict.fromkeys(row["contender"] for row in rows):
            points = [(row["value"], row["time"]) for row in rows if row["contender"] == name]
            panel.loglog(*zip(*points, strict=True), marker="o", label=name)
        panel.set(xlabel=axis, ylabel=unit)
        panel.set_xticks(values := sorted({row["value"] for row in rows}), map(str, values))
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.minorticks_off()
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    file = Path(__file__).parent / "_build" / "growth.svg"
    file.parent.mkdir(exist_ok=True)
    figure.savefig(file)
    return "_build/growth.svg"


def _without(row: dict, *fields: str) -> dict:
    return {key: value for key, value in row.items() if key not in fields}


def _middle(values: list) -> object:
    """The median; nothing where one of them is missing, as when a target was not reached."""
    return "-" if None in values else statistics.median(values)


SPEED = {"steps": steps_tables, "training": training_tables, "growth": growth_tables}


def speed(name: str, records: dict[str, dict]) -> str:
    """What is on record of one of the three protocols, and how it was made."""
    if name not in records:
        return "*There is no run on record.*"
    record = records[name]
    said = [("work", record["work"]), *record["settings"].items(), ("processor", record["processor"])]
    said += record["versions"].items()
    made = "; ".join(f"{key} {value}" for key, value in said)
    return "\n".join([SPEED[name](record), f"```sh\n{record['command']}\n```", "", f"{made}.", ""])


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


_records = read_records(Path(__file__).parent / "results")
myst_substitutions = {name: speed(name, _records) for name in SPEED}
myst_substitutions |= comparison(_records["compare-elbos"])
myst_substitutions["results"] = results_page(_without(_records, *SPEED, "compare-elbos"))


# The house, drawn from the table of its rooms.


def draw_house(page: str) -> None:
    """A box for each room, on its floor; five to a row."""
    rooms = re.findall(r"^\| (\d) \| `(\w+\.py)` \| ([^|]*) \|", page, re.MULTILINE)
    rows = []
    for floor in sorted({floor for floor, _, _ in rooms}):
        here = [(name, re.sub("`[^`]*`: |`", "", idea)) for number, name, idea in rooms if number == floor]
        few = -(-len(here) // -(-len(here) // 5))  # as even as they go
        rows += [(floor, here[i : i + few]) for i in range(0, len(here), few)]
    figure = Figure(figsize=(11, len(rows)))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-0.4, 10), ylim=(0.4, len(rows) + 0.6))
    axes.axis("off")
    for height, (floor, here) in enumerate(rows, 1):
        axes.text(-0.2, height, floor, va="center", ha="center", color="grey", size=13)
        width = 10 / len(here)
        for number, (name, idea) in enumerate(here):
            box = (number * width, height - 0.42)
            axes.add_patch(Rectangle(box, width - 0.1, 0.84, facecolor="#eef3f8", edgecolor="#4a6785"))
            centre = number * width + width / 2 - 0.05
            axes.text(centre, height + 0.22, name, va="center", ha="center", weight="bold", size=10)
            wrapped = textwrap.fill(re.split("[;:,]", idea)[0], int(14 * width))
            axes.text(centre, height - 0.12, wrapped, va="center", ha="center", size=8)
    file = Path(__file__).parent / "_build" / "house.svg"
    file.parent.mkdir(exist_ok=True)
    figure.savefig(file)


draw_house((Path(__file__).parent / "architecture.md").read_text())
