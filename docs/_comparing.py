"""Tables and figures of the page on comparing ELBOs, from the records of examples/compare_elbos.py."""

import json
import math
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

import pyro_vae as pv
from _records import is_table, plain, table

HERE = Path(__file__).parent
PAIRS = {
    "bernoulli": "Bernoulli",
    "two-layers": "two layers",
    "gaussian": "Gaussian, learned sigma",
    "linear-gaussian": "linear-Gaussian",
}
FEW, MANY = 5, 50


def comparison(folder: Path) -> dict[str, str]:
    """Return the text and tables of the page, and save its figures."""
    records = {name: json.loads((folder / f"{name}.json").read_text()) for name in PAIRS}
    pictures = HERE / "_build" / "compare"
    pictures.mkdir(parents=True, exist_ok=True)
    figures = {"kl": closed_form_figure(records), "training": training_figure(records["bernoulli"])}
    for name, record in records.items():
        stages = dict(zip(("early", "mid", "late"), record["stages"], strict=True))
        titled = {
            f"{stage}, {steps:,} steps": [r for r in record["comparison"] if r["stage"] == stage]
            for stage, steps in stages.items()
        }
        figures[name] = pv.plots.signal_over_particles(titled, floor=record["snr_floor"])
    for name, figure in figures.items():
        figure.savefig(pictures / f"{name}.png", bbox_inches="tight")
    late = {
        f"compare_{name.replace('-', '_')}": "\n".join(table(late_rows(record)))
        for name, record in records.items()
    }
    return late | {
        "compare_runs": "\n\n".join(map(run, records.values())),
        "compare_claims": "\n".join(table(claims(records))),
        "compare_bias": "\n".join(table(biases(records["linear-gaussian"]))),
        "compare_refused": "\n".join(refusals(records)),
        "compare_training": "\n".join(table(trained(records["bernoulli"]))),
    }


# The records.


def found(record: dict, **fields: object) -> list[dict]:
    """Return the rows of a comparison with these fields."""
    return [row for row in record["comparison"] if fields.items() <= row.items()]


def both(record: dict, one: dict, other: dict, **fields: object) -> list[tuple[dict, dict]]:
    """Return the rows of two estimators side by side, of every seed and stage."""
    pairs = []
    for row in found(record, **one, **fields):
        same = {"seed": row["seed"], "stage": row["stage"], "group": row["group"]}
        pairs += [(row, beside) for beside in found(record, **(same | other))]
    return pairs


def of(estimator: str, particles: int) -> dict:
    """Return the fields that name an estimator."""
    return {"estimator": estimator, "particles": particles}


def over_seeds(values: Iterable[float], digits: int = 3) -> str:
    """Return a mean, and the least and the largest value."""
    values = list(values)
    return f"{statistics.fmean(values):.{digits}g} ({min(values):.{digits}g} to {max(values):.{digits}g})"


# The tables.


def run(record: dict) -> str:
    """Return the command of a record and what its numbers depend on."""
    machine = record["machine"]
    versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
    skipped = ("command", "machine", "refused", "snr_floor")
    settings = [f"{k}: {plain(v)}" for k, v in record.items() if k not in skipped and not is_table(v)]
    settings.append(f"machine: {machine['processor']}, one thread, {versions}")
    return f"```sh\n{record['command']}\n```\n\n{'; '.join(settings)}."


def late_rows(record: dict) -> list[dict]:
    """Return a row for each estimator late in training, with means and ranges over the seeds."""
    rows = []
    kinds = dict.fromkeys((r["estimator"], r["particles"]) for r in record["comparison"])
    for name, k in kinds:
        guide, model = (found(record, stage="late", group=g, **of(name, k)) for g in ("guide", "model"))
        rows.append(
            {
                "estimator": name,
                "k": k,
                "gap": over_seeds(r["gap"] for r in guide),
                "sd of a draw": f"{statistics.fmean(r['value_sd'] for r in guide):.2g}",
                "SNR model": f"{statistics.fmean(r['snr'] for r in model):.3f}",
                "SNR guide": over_seeds(r["snr"] for r in guide),
                "SNR/√s model": f"{statistics.fmean(r['snr_per_root_second'] for r in model):.3g}",
                "SNR/√s guide": over_seeds(r["snr_per_root_second"] for r in guide),
                "ms": f"{statistics.median(r['ms'] for r in guide):.1f}",
            }
        )
    return sorted(rows, key=lambda row: row["k"])


def biases(record: dict) -> list[dict]:
    """Return how often the noise explains the bias of each estimator, where the truth is exact."""
    rows = []
    for name, k in dict.fromkeys((r["estimator"], r["particles"]) for r in record["comparison"]):
        guide, model = (found(record, group=group, **of(name, k)) for group in ("guide", "model"))
        row = {"estimator": name, "k": k, "value": rms(r["bias"] / r["bias_error"] for r in guide)}
        for group, members in (("model", model), ("guide", guide)):
            known = [r for r in members if r["gradient_bias"] is not None]
            row[f"gradient, {group}"] = rms(r["gradient_bias"] / r["gradient_bias_error"] for r in known)
        rows.append(row)
    return sorted(rows, key=lambda row: row["k"])


def rms(ratios: Iterable[float]) -> str:
    """Return the root mean square, and the largest absolute value."""
    ratios = [abs(ratio) for ratio in ratios]
    return f"{math.sqrt(statistics.fmean(r * r for r in ratios)):.2f} (at most {max(ratios):.1f})"


def refusals(records: dict[str, dict]) -> list[str]:
    """Return which estimators a pair has no right number of, and why."""
    return [
        f"- *{PAIRS[pair]}*, `{name}`: {why}" for pair, record in records.items()
        for name, why in record["refused"].items()
    ]  # fmt: skip


def trained(record: dict) -> list[dict]:
    """Return what each estimator has trained at the end, with its range over the seeds."""
    last = {(r["estimator"], r["particles"], r["seed"]): r for r in record["training"]}
    rows = []
    for name, k in dict.fromkeys((name, k) for name, k, _ in last):
        runs = [r for (n, p, _), r in last.items() if (n, p) == (name, k)]
        rows.append(
            {
                "estimator": name,
                "k": k,
                "steps": f"{statistics.fmean(r['steps'] for r in runs):,.0f}",
                "log p(x) >=, mean (range)": over_seeds((r["log_evidence"] for r in runs), 5),
            }
        )
    return rows


# What the page says of every seed, stage and pair, counted.

Claim = Callable[[dict], list[bool]]


def less(field: str, one: dict, other: dict, group: str = "guide") -> Claim:
    """Return the claim that a field of one estimator is less than that of another."""
    return lambda record: [a[field] < b[field] for a, b in both(record, one, other, group=group)]


def same(field: str, one: dict, other: dict, group: str = "model") -> Claim:
    """Return the claim that a field of two estimators is equal but for rounding."""
    return lambda record: [
        math.isclose(a[field], b[field], rel_tol=2e-3) for a, b in both(record, one, other, group=group)
    ]


TRACE, FIELD, STL = of("Trace_ELBO", 1), of("MeanField", 1), of("STL", 1)
CLAIMS: dict[str, Claim] = {
    "`MeanField` has a quieter guide gradient than `Trace_ELBO`": less("gradient_variance", FIELD, TRACE),
    "`STL` has a quieter guide gradient than `MeanField`": less("gradient_variance", STL, FIELD),
    "`Trace_ELBO` has a quieter value than `MeanField`": less("value_sd", TRACE, FIELD),
    "`Trace_ELBO` and `STL` have the same model gradient": same("gradient_variance", TRACE, STL),
    "`TraceGraph_ELBO` is `Trace_ELBO`": same("gradient_variance", TRACE, of("TraceGraph_ELBO", 1), "guide"),
    "`TraceMeanField_ELBO` is `MeanField`": same(
        "gradient_variance", of("TraceMeanField_ELBO", 1), FIELD, "guide"
    ),
    "`RenyiELBO(0)` is `IWAE`, k = 5": same(
        "gradient_variance", of("RenyiELBO(0)", FEW), of("IWAE", FEW), "guide"
    ),
    "`DReG` has more signal for the guide than `IWAE`, k = 5": less("snr", of("IWAE", FEW), of("DReG", FEW)),
    "`DReG` has more signal for the guide than `IWAE`, k = 50": less(
        "snr", of("IWAE", MANY), of("DReG", MANY)
    ),
    "`IWAE` has less signal for the guide at k = 50 than at 5": less(
        "snr", of("IWAE", MANY), of("IWAE", FEW)
    ),
    "`DReG` has less signal for the guide at k = 50 than at 5": less(
        "snr", of("DReG", MANY), of("DReG", FEW)
    ),
    "`STL` has more signal for the guide at k = 5 than `DReG`": less("snr", of("DReG", FEW), of("STL", FEW)),
    "the bound of `IWAE` is tighter at k = 50 than at 5": less("gap", of("IWAE", MANY), of("IWAE", FEW)),
    "at equal time, `STL` has more signal for the guide at k = 5 than at 1": less(
        "snr_per_root_second", STL, of("STL", FEW)
    ),
}


def claims(records: dict[str, dict]) -> list[dict]:
    """Return a row for each claim: in how many of the seeds and stages of each pair it holds."""
    rows = []
    for text, holds in CLAIMS.items():
        row = {"claim": text}
        for pair, record in records.items():
            cases = holds(record)
            row[PAIRS[pair]] = f"{sum(cases)} of {len(cases)}" if cases else "refused"
        rows.append(row)
    return rows


# The figures.


def closed_form_figure(records: dict[str, dict]) -> Figure:
    """Draw the noise with the KL in closed form, relative to that by Monte Carlo, of each pair and stage."""
    figure = Figure(figsize=(9, 3.8), dpi=150, layout="tight")
    stages = ("early", "mid", "late")
    panels = (("value_sd", 1, "the value"), ("gradient_variance", 0.5, "the guide's gradient"))
    for axes, (field, power, title) in zip(figure.subplots(1, 2), panels, strict=True):
        for number, (name, record) in enumerate(records.items()):
            points = [
                [
                    (a[field] / b[field]) ** power
                    for a, b in both(record, FIELD, TRACE, stage=s, group="guide")
                ]
                for s in stages
            ]
            means = [statistics.fmean(point) for point in points]
            ends = [[m - min(p) for m, p in zip(means, points, strict=True)]]
            ends.append([max(p) - m for m, p in zip(means, points, strict=True)])
            at = [place + 0.08 * (number - 1.5) for place in range(3)]
            axes.errorbar(at, means, yerr=ends, marker="osD^"[number], capsize=3, lw=1, label=PAIRS[name])
        axes.axhline(1, color="k", lw=1)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 4, 6, 8)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        axes.set_xticks(range(3), stages)
        axes.set_title(f"noise of {title}", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("standard deviation,\nclosed form / Monte Carlo")
    figure.axes[0].legend(frameon=False, fontsize=8)
    return figure


def training_figure(record: dict) -> Figure:
    """Draw the bound on log p(x) over the seconds of training, mean and range over the seeds."""
    figure = Figure(figsize=(9, 4.2), dpi=150, layout="tight")
    counts = list(dict.fromkeys(r["particles"] for r in record["training"]))
    names = list(dict.fromkeys(r["estimator"] for r in record["training"]))
    for axes, k in zip(figure.subplots(1, len(counts), sharey=True, squeeze=False)[0], counts, strict=True):
        for name in names:
            rows = [r for r in record["training"] if (r["estimator"], r["particles"]) == (name, k)]
            by_seed = [[r for r in rows if r["seed"] == seed] for seed in {r["seed"] for r in rows}]
            if not by_seed:
                continue
            seconds = [statistics.fmean(r["seconds"] for r in part) for part in zip(*by_seed, strict=True)]
            bounds = [[r["log_evidence"] for r in part] for part in zip(*by_seed, strict=True)]
            colour, marker = f"C{names.index(name)}", "osD^v<>P"[names.index(name)]
            axes.plot(seconds, [*map(statistics.fmean, bounds)], c=colour, marker=marker, ms=4, label=name)
            axes.fill_between(
                seconds, [*map(min, bounds)], [*map(max, bounds)], color=colour, alpha=0.12, lw=0
            )
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set(xlabel="seconds of one core", title=f"k = {k}")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.axes[0].set_ylabel("test log p(x) at least,\nnats per data point (higher is better)")
    return figure
