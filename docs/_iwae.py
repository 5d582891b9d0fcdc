"""The table of Burda et al. 2015 beside the records of examples/reproduce_iwae.py."""

import json
from pathlib import Path

from matplotlib.figure import Figure

# (row, layers, k): -log p(x) in nats, of the paper's table 1 and of the README of github.com/nbip/IWAE at
# 0216b45. The paper's number for a bound stands beside each of its gradients.
PUBLISHED = {
    ("VAE", 1, 1): (86.76, 86.35),
    ("VAE", 1, 5): (86.47, 86.10),
    ("VAE", 1, 50): (86.35, 86.06),
    ("VAE by STL", 1, 1): (86.76, 86.08),
    ("VAE by STL", 1, 5): (86.47, None),
    ("VAE by STL", 1, 50): (86.35, None),
    ("IWAE", 1, 5): (85.54, 85.18),
    ("IWAE", 1, 50): (84.78, 84.59),
    ("IWAE by DReG", 1, 5): (85.54, 84.90),
    ("IWAE by DReG", 1, 50): (84.78, 84.32),
    ("VAE", 2, 1): (85.33, 84.83),
    ("VAE", 2, 5): (85.01, 84.08),
    ("VAE", 2, 50): (84.78, 83.89),
    ("VAE by STL", 2, 1): (85.33, None),
    ("VAE by STL", 2, 5): (85.01, None),
    ("VAE by STL", 2, 50): (84.78, None),
    ("IWAE", 2, 5): (83.89, 83.48),
    ("IWAE", 2, 50): (82.90, 82.82),
    ("IWAE by DReG", 2, 5): (83.89, None),
    ("IWAE by DReG", 2, 50): (82.90, None),
}
ROWS = {"vae": "VAE", "stl": "VAE by STL", "iwae": "IWAE", "dreg": "IWAE by DReG"}
AT_ONE = {"iwae": "vae", "dreg": "stl"}  # what an objective is at k = 1


def iwae(folder: Path) -> dict[str, str]:
    """Return the sentences, the table and the runs of the page, from the records in a folder."""
    records = read(folder)
    found, beyond = by_row(records)
    rows = {key(record) for record in beyond}
    compared = [record for record in records if key(record) in rows]
    return {
        "iwae_sentences": "\n".join(map(sentence, records)) or "- There is no run on record.",
        "iwae_table": "\n".join([*HEAD, *(line for row in found for line in lines(row, found[row]))]),
        "iwae_beyond": "\n".join([*HEAD, *map(beyond_line, compared)]) if beyond else "*Not run yet.*",
        "iwae_runs": "\n".join(map(details, records)),
        "iwae_weights": weights(records),
    }


def read(folder: Path) -> list[dict]:
    """Return the records in the order of the table, and of their passes."""
    records = [json.loads(file.read_text()) for file in folder.glob("*.json")]
    return sorted(records, key=lambda record: (key(record)[1:], key(record)[0], record["passes"]))


def by_row(records: list[dict]) -> tuple[dict[tuple, list[dict]], list[dict]]:
    """Return the records of each row of the table, and those beyond it."""
    found: dict[tuple, list[dict]] = {row: [] for row in PUBLISHED}
    beyond = []
    for record in records:
        plain = record["prior"] == "normal" and record["hidden_dim"] == 200
        (found[key(record)] if plain else beyond).append(record)
    return found, beyond


def draw_iwae(folder: Path) -> None:
    """Draw the best run of each row beside the published numbers, into _build/iwae.png."""
    run = {row: records for row, records in by_row(read(folder))[0].items() if records}
    figure = Figure(figsize=(7, 1.2 + 0.5 * len(run)), layout="constrained")
    axes = figure.subplots()
    for height, (row, records) in enumerate(run.items()):
        paper, reproduction = PUBLISHED[row]
        best = min(-record["test_log_evidence"] for record in records)
        label = height == 0
        axes.plot(paper, height, "s", color="grey", ms=9, label="paper" if label else None)
        if reproduction is not None:
            axes.plot(reproduction, height, "D", color="C0", label="reproduction" if label else None)
        axes.plot(best, height, "o", color="C3", ms=9, label="this package" if label else None)
    axes.set_yticks(range(len(run)), [name(row) for row in run])
    axes.set(xlabel="-log p(x) on test images, nats per data point (lower is better)")
    axes.margins(y=0.3)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    file = Path(__file__).parent / "_build" / "iwae.png"
    file.parent.mkdir(exist_ok=True)
    figure.savefig(file, dpi=120)


HEAD = [
    "| row | paper | reproduction | ours | gap to the paper | passes | minutes |",
    "|---|---:|---:|---:|---:|---:|---:|",
]


def key(record: dict) -> tuple[str, int, int]:
    k, objective = int(record["k"]), record["objective"]
    return ROWS[AT_ONE.get(objective, objective) if k == 1 else objective], int(record["layers"]), k


def name(row: tuple[str, int, int]) -> str:
    return f"{row[1]} layer{'s' * (row[1] > 1)}, {row[0]}, k = {row[2]}"


def gap(record: dict) -> float:
    return -record["test_log_evidence"] - PUBLISHED[key(record)][0]


def ours(record: dict) -> str:
    return f"{-record['test_log_evidence']:.2f} ± {record['standard_error']:.2f}"


def cells(record: dict) -> str:
    return f"{record['passes']:,} | {record['training_seconds'] / 60:.0f}"


def lines(row: tuple[str, int, int], records: list[dict]) -> list[str]:
    """Return a line for each run of a row; a row without any says so."""
    published = " | ".join("-" if number is None else f"{number:.2f}" for number in PUBLISHED[row])
    head = f"| {name(row)} | {published} | "
    runs = [f"{head}{ours(record)} | {gap(record):+.2f} | {cells(record)} |" for record in records]
    return runs or [f"{head}not run | | | |"]


def beyond_line(record: dict) -> str:
    title = f"{name(key(record))}, {record['prior']} prior, {record['hidden_dim']} units"
    return f"| {title} | - | - | {ours(record)} | {gap(record):+.2f} | {cells(record)} |"


def sentence(record: dict) -> str:
    """Return what a run found, as one point of a list."""
    row, minutes = key(record), record["training_seconds"] / 60
    far = "above" if gap(record) > 0 else "below"
    extra = "" if record["prior"] == "normal" else f", {record['prior']} prior"
    extra += "" if record["hidden_dim"] == 200 else f", {record['hidden_dim']} units"
    return (
        f"- {name(row)}{extra}: **{-record['test_log_evidence']:.2f}**, which is "
        f"{abs(gap(record)):.2f} {far} the paper's {PUBLISHED[row][0]}, after {record['passes']:,} passes in "
        f"{minutes:.0f} minutes."
    )


def weights(records: list[dict]) -> str:
    """Return which number the command for the weights of the quick row prints."""
    quick = next((r for r in records if r.get("weights")), None)
    if quick is None:
        return "*There are no weights on record.*"
    return (
        f"It prints {ours(quick)} nats per data point, the number of the row after {quick['passes']} passes. "
        "The weights are in 16 bits, which moves it by less than 0.01."
    )


def details(record: dict) -> str:
    """Return the command of a run, and what its number depends on."""
    machine, k = record["machine"], record["k"]
    versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
    active = ", ".join(f"{count} of {site}" for site, count in record["active_units"].items())
    facts = {
        "ELBO on test data": f"{record['test_elbo']:.2f}",
        "on training data": f"{record['train_elbo']:.2f}",
        f"importance-weighted bound of {k} samples on test data": f"{record['test_bound']:.2f}",
        "and on training data": f"{record['train_bound']:.2f}",
        "log p(x) on test data": f"{record['test_log_evidence']:.2f} {record['unit']}",
        "its error over images": f"{record['standard_error']:.2f}",
        f"and over {record['num_samples']:,} samples": f"{record['monte_carlo_error']:.3f}",
        "active units": active,
        "seed": record["seed"],
        "batch size": record["batch_size"],
        "steps": f"{record['steps']:,}",
        "peak of the learning rate": record["lr"],
        "threads": machine["threads"],
        "training in": "bfloat16, by autocast" if record.get("bfloat16") else "float32",
        "machine": f"{machine['processor']}, {versions}",
    }
    settings = "; ".join(f"{fact}: {value}" for fact, value in facts.items())
    return f"```sh\n{record['command']}\n```\n\n{settings}.\n"
