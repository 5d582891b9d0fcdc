"""Read the recorded runs and print them as Markdown tables; make the page of results."""

import json
from pathlib import Path


def read_records(folder: Path) -> dict[str, dict]:
    """Return the recorded runs: the JSON files that name the command that made them."""
    found = {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}
    return {name: record for name, record in found.items() if "command" in record}


def results_page(records: dict[str, dict]) -> str:
    """Return one table of the numbers on test data, then the command and settings of each run."""
    if not records:
        return "There are no runs on record."
    numbers = ["test_elbo", "test_reconstruction", "test_kl", "test_log_evidence"]
    lines = [
        "| run | likelihood | hidden units | epochs | data, protocol | unit | ELBO | reconstruction | KL | "
        "log p(x) >= |",
        "|---|---|---:|---:|---|---|---:|---:|---:|---:|",
    ]
    details = []
    for name, record in records.items():
        if set(numbers) <= record.keys():
            bounds = record.get("log_sigma_bounds")
            likelihood = record["likelihood"] + (f", log sigma in {tuple(bounds)}" if bounds else "")
            cells = [name, likelihood, *(str(record.get(size, "")) for size in ("hidden_dim", "epochs"))]
            cells += [f"{record['dataset']}, {record['protocol']}", record["unit"]]
            cells += [f"{record[number]:.2f}" for number in numbers]
            cells[-1] += f" ({record['num_samples']} samples)"
            lines.append("| " + " | ".join(cells) + " |")
        settings = {k: v for k, v in record.items() if k not in [*numbers, "command"] and not is_table(v)}
        details += [f"**{name}**", "", "```sh", record["command"], "```", ""]
        details += ["; ".join(f"{k}: {plain(v)}" for k, v in settings.items()) + ".", ""]
        details += [*table(record.get("rows", [])), ""]
    head = lines if len(lines) > 2 else []
    return "\n".join([*head, "", *details])


def clusters(record: dict) -> str:
    """Return a table with one row per seed of the mixture, and the mean and best accuracy."""
    accuracies = [row["accuracy"] for row in record["rows"]]
    mean = f"mean accuracy {sum(accuracies) / len(accuracies):.1%}, best {max(accuracies):.1%}"
    about = f"{len(accuracies)} seeds, MNIST, {record['protocol']}; {record['unit']}: {mean}."
    return "\n".join([*table(record["rows"]), "", about])


def completion(record: dict) -> str:
    """Return what a run of the example of missing pixels found."""
    return (
        f"$-\\log p(\\text{{lower}} \\mid \\text{{upper}})$ is {-record['log_p_lower_given_upper']:.2f} ± "
        f"{record['standard_error']:.2f} nats per data point, on {record['images']} test images with their "
        f"standard error; $-\\log p(x)$ of the whole images is at most {-record['log_p_x_at_least']:.2f}. "
        f"Protocol: {record['test_protocol']}; {record['num_samples']} importance samples; "
        f"{record['epochs']} epochs with K = {record['particles']} in training; seed {record['seed']}."
    )


def table(rows: list[dict]) -> list[str]:
    """Return the rows of a record as a table with one column per field."""
    if not rows:
        return []
    fields = list(rows[0])
    rule = "|" + "|".join("---" if isinstance(rows[0][field], str) else "---:" for field in fields) + "|"
    cells = [[plain(row[field]) for field in fields] for row in rows]
    return (
        ["| " + " | ".join(line) + " |" for line in [fields]]
        + [rule]
        + ["| " + " | ".join(line) + " |" for line in cells]
    )


def is_table(value: object) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def plain(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def without(row: dict, *fields: str) -> dict:
    return {key: value for key, value in row.items() if key not in fields}
