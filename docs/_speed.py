"""Tables and figures of the page on speed, from the records of benchmarks/run.py."""

import statistics
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from _records import table, without


def steps_tables(record: dict) -> str:
    """Return one table for each number of threads and each batch size."""
    rows, lines = record["rows"], []
    for threads, batch in dict.fromkeys((row["threads"], row["batch"]) for row in rows):
        at = [row for row in rows if (row["threads"], row["batch"]) == (threads, batch)]
        lines += [f"**Batch {batch}, {threads} thread{'s' * (threads > 1)}**", ""]
        lines += [*table([without(row, "threads", "batch") for row in at]), ""]
    return "\n".join(lines)


def in_short(steps: dict, training: dict) -> str:
    """Return what the records say of this package beside others, on one thread."""

    def ratios(contender: str, column: str) -> str:
        """The ratios of a contender at the batch sizes, the smallest batch first."""
        rows = [row for row in steps["rows"] if row["threads"] == 1 and row["contender"] == contender]
        return ", ".join(f"{row[column]:.2f}" for row in sorted(rows, key=lambda row: row["batch"]))

    def epoch(contender: str, column: str) -> str:
        rows = [row for row in training["rows"] if row["threads"] == 1 and row["contender"] == contender]
        return f"{statistics.median(row[column] for row in rows):.2f}"

    compiled, replayed = (f"pyro_vae, {how} TraceMeanField" for how in ("compiled", "replayed"))
    batches = ", ".join(f"{batch:,}" for batch in sorted({row["batch"] for row in steps["rows"]}))
    lines = [
        f"Times of a step are ratios at batch sizes of {batches}: one thread, {steps['processor']}.",
        "",
        f"- *A compiled step* takes {ratios(compiled, 'x Pyro')} of the time of `pyro.infer.SVI`, and "
        f"{ratios(compiled, 'x NumPyro')} of that of NumPyro's jitted step.",
        f"- *A replayed step*, which needs no compiler, takes {ratios(replayed, 'x Pyro')} of the time of "
        "`pyro.infer.SVI`.",
        f"- *In bfloat16* a compiled step takes {ratios(f'{compiled}, reduced', 'x NumPyro')} of the time of "
        "NumPyro's float32 step.",
        f"- *Most of a step is its matrix products*: alone, they take "
        f"{ratios('matrix products alone', 'x NumPyro')} of NumPyro's step.",
        f"- *An epoch* with data takes {epoch(compiled, 'x Pyro')} of that of `pyro.infer.SVI`, compiled, "
        f"and {epoch(compiled, 'x NumPyro')} of NumPyro's. The first step compiles, so a short training is "
        f"sooner done replayed: {epoch(replayed, 'to target, s')} s to the target, against "
        f"{epoch(compiled, 'to target, s')} s compiled and {epoch('NumPyro', 'to target, s')} s by NumPyro.",
    ]
    return "\n".join(lines)


def training_tables(record: dict) -> str:
    """Return one table for each number of threads, with medians over the seeds."""
    rows, lines = record["rows"], []
    for threads in dict.fromkeys(row["threads"] for row in rows):
        at = [row for row in rows if row["threads"] == threads]
        seeds = ", ".join(str(seed) for seed in dict.fromkeys(row["seed"] for row in at))
        lines += [f"**Training, {threads} thread{'s' * (threads > 1)}, seeds {seeds}**", ""]
        merged = []
        for name in dict.fromkeys(row["contender"] for row in at):
            same = [without(row, "threads", "seed", "contender") for row in at if row["contender"] == name]
            merged.append({"contender": name} | {key: _median([row[key] for row in same]) for key in same[0]})
        lines += [*table(merged), ""]
    return "\n".join(lines)


def growth_tables(record: dict) -> str:
    """Return the plot, and one table for each axis."""
    lines = [f"![Cost against each number]({draw_growth(record)})", ""]
    for axis, unit in dict.fromkeys((row["axis"], row["unit"]) for row in record["rows"]):
        rows = [row for row in record["rows"] if row["axis"] == axis]
        lines += [f"**{unit} against {axis}**", ""]
        times = {row["contender"]: {"contender": row["contender"]} for row in rows}
        for row in rows:
            times[row["contender"]][f"{row['value']:,}"] = row["time"]
        lines += [*table(list(times.values())), ""]
    return "\n".join(lines)


def draw_growth(record: dict) -> str:
    """Draw one panel per axis with one line per contender. Return the path of the figure."""
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


def _median(values: list) -> object:
    """Return the median, or "-" if a value is missing because a target was not reached."""
    return "-" if None in values else statistics.median(values)


SPEED = {
    "steps": steps_tables,
    "epochs": steps_tables,
    "memory": steps_tables,
    "training": training_tables,
    "growth": growth_tables,
}


def speed(name: str, records: dict[str, dict]) -> str:
    """Return the tables of a protocol, and the command and settings that made them."""
    if name not in records:
        return "*There is no run on record.*"
    record = records[name]
    settings = [("work", record["work"]), *record["settings"].items(), ("processor", record["processor"])]
    settings += record["versions"].items()
    made = "; ".join(f"{key} {value}" for key, value in settings)
    return "\n".join([SPEED[name](record), f"```sh\n{record['command']}\n```", "", f"{made}.", ""])


def on_a_gpu(records: dict[str, dict]) -> str:
    """Return the tables of a run of benchmarks/gpu.py."""
    if not records:
        return "*There is no run on record.*"
    parts = [speed(name, records) for name in ("steps", "epochs")]
    if "evidence" in records:
        evidence = records["evidence"]
        parts += [f"{evidence['work']}:", "", *table(evidence["rows"]), ""]
        parts += ["", f"```sh\n{evidence['command']}\n```", ""]
    return "\n".join(parts)
