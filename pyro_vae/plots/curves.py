"""Curves and bars: the progress of a training, and estimators of a bound side by side.

Titles and names from outside are drawn as they are, without formulas. Every function raises
ValueError for input that it cannot draw correctly.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from pyro_vae.arguments import given, require
from pyro_vae.plots.checks import check_records, is_list, is_ratio, is_real
from pyro_vae.plots.figure import DPI, NotebookFigure, legend, plain


def learning_curves(epochs: Sequence[Any]) -> Figure:
    """Draw the training loss, the negative ELBO and its two terms, in nats per data point.

    Args:
        epochs: records with the numbers ``epoch``, ``loss``, ``elbo``, ``reconstruction`` and ``kl`` as
            attributes; elbo = reconstruction - kl, reconstruction = E_q[log p(x | z)].
    """
    to_fix = "pass the records of fit, list(pv.fit(...))"
    require(is_list(epochs), "epochs", "a list of records", given(epochs), to_fix)
    require(len(epochs) > 0, "epochs", "at least one record", "none", "train first")
    curves = {}
    for name in ("epoch", "loss", "elbo", "reconstruction", "kl"):
        for epoch in epochs:
            require(hasattr(epoch, name), "epochs", f"records with {name}", f"{given(epoch)} without", to_fix)
        values = [getattr(e, name) for e in epochs]
        bad = [value for value in values if not is_real(value)]
        drop = "drop the epochs that diverged or have no ELBO; of a tensor, take .item()"
        require(not bad, f"epochs: {name}", "finite numbers", given(bad[:5]), drop)
        curves[name] = [float(value) for value in values]
    at, loss, elbo, reconstruction, kl = curves.values()
    panels = (
        ("objective", {"training loss": loss, "negative ELBO": [-value for value in elbo]}),
        ("reconstruction, E[log p(x | z)]", {"reconstruction": reconstruction}),
        ("KL(q || p)", {"KL": kl}),
    )
    figure = NotebookFigure(figsize=(11, 3.4), dpi=DPI, layout="tight")
    marker = "o" if len(at) <= 25 else ""  # a line through one epoch is invisible
    colours = iter(("C0", "C1", "C2", "C3"))
    for axes, (title, lines) in zip(figure.subplots(1, 3), panels, strict=True):
        for (label, curve), style in zip(lines.items(), ("-", "--"), strict=False):
            axes.plot(at, curve, style, marker=marker, ms=4, color=next(colours), label=label)
        axes.set(title=title, xlabel="epoch", ylabel="nats per data point")
        axes.set_xlim(min(at) - 0.5, max(at) + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        axes.ticklabel_format(axis="y", useOffset=False)
        plain(axes)
    figure.axes[0].legend(frameon=False)
    return figure


def elbo_comparison(records: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw estimators of a bound side by side: the bound, its cost, and the signal in its gradient.

    The first row shows the gap to log p(x) (or the value, if a gap is missing), with two standard errors, and
    the milliseconds. One row per group follows. An infinite or missing number is written, not drawn.

    Args:
        records: ``Comparison.records``, dicts with ``estimator``, ``particles``, ``value``, ``value_error``,
            ``gap``, ``ms``, ``group``, ``snr`` and ``snr_per_root_second``.
    """
    fields = ("value", "value_error", "gap", "ms", "snr", "snr_per_root_second")
    check_records("records", records, fields)
    negative = [r["value_error"] for r in records if (r["value_error"] or 0) < 0]
    require(not negative, "records: value_error", "0 or more", negative, "compare again")
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        groups.setdefault(record["group"], []).append(record)
    first = next(iter(groups.values()))
    names = [f"{r['estimator']}, k = {r['particles']}" for r in first]
    for group, members in groups.items():
        same = [f"{r['estimator']}, k = {r['particles']}" for r in members]
        agrees = same == names
        require(agrees, f"records: group {group}", f"the estimators {names}", same, "compare all together")
    if all(r["gap"] is not None for r in first):
        bound = ("gap", "gap of the bound to log p(x), nats per data point\n(shorter is tighter)")
    else:
        bound = ("value", "value of the bound, nats per data point\n(right is tighter)")
    rows = [[(first, *bound), (first, "ms", "milliseconds a draw\n(shorter is cheaper)")]]
    for group, members in groups.items():
        signal = f"signal / noise of the gradient, {group}:"
        per_draw = (members, "snr", f"{signal}\na draw (longer is better)")
        per_second = (members, "snr_per_root_second", f"{signal}\na second of draws (longer is better)")
        rows.append([per_draw, per_second])
    places = range(len(names))
    figure = NotebookFigure(figsize=(10, len(rows) * (1.1 + 0.25 * len(names))), dpi=DPI, layout="tight")
    grid = figure.subplots(len(rows), 2, sharey=True, squeeze=False)
    for panels, row in zip(grid, rows, strict=True):
        for axes, (members, field, title) in zip(panels, row, strict=True):
            numbers = [math.nan if r[field] is None else float(r[field]) for r in members]
            drawn = [number if math.isfinite(number) else 0.0 for number in numbers]
            noisy = field in ("gap", "value")
            errors = [2 * r["value_error"] if noisy and is_real(r["value_error"]) else 0.0 for r in members]
            if field == "value":  # its zero has no meaning, so a bar from zero would mislead
                axes.plot(drawn, places, "o", color="C0")
            else:
                axes.barh(places, drawn, height=0.6, color="C0", alpha=0.75)
            if any(errors):
                axes.errorbar(drawn, places, xerr=errors, fmt="none", ecolor="k", capsize=3, lw=1)
            for place, number, at, error in zip(places, numbers, drawn, errors, strict=True):
                text, end = "none" if math.isnan(number) else f"{number:.3g}", (at + error, place)
                axes.annotate(text, end, (5, 0), textcoords="offset points", va="center", size=8)
            axes.set_title(title, fontsize=10, parse_math=False)
            axes.set_yticks(places, names, parse_math=False)
            axes.set_ylim(len(names) - 0.5, -0.5)
            axes.margins(x=0.15)
            plain(axes)
    return figure


def signal_over_particles(stages: Mapping[str, Sequence[Mapping[str, Any]]], *, floor: float = 0.0) -> Figure:
    """Draw the signal-to-noise ratio of gradients against particles: one row per group, one column per stage.

    Args:
        stages: title -> ``Comparison.records`` of estimators at several numbers of particles, dicts with
            ``estimator``, ``particles``, ``group`` and ``snr``; one line per ``estimator``. Several records
            of one point, such as those of several seeds, are drawn as their mean, with their range as a band.
            A ratio that is missing, infinite or 0 is left out.
        floor: ``Comparison.snr_floor``, drawn as a line.
    """
    to_fix = "pass a dict, such as {'early': compared.records}"
    titled = isinstance(stages, Mapping) and all(isinstance(title, str) for title in stages)
    require(titled, "stages", "a dict, title -> records", given(stages), to_fix)
    require(len(stages) > 0, "stages", "at least one", "none", to_fix)
    for title, records in stages.items():
        check_records(f"stages: {title}", records, ("snr",))
    least = is_real(floor) and floor >= 0
    require(least, "floor", "a number, 0 or more", given(floor), "pass compared.snr_floor")
    every = [record for records in stages.values() for record in records]
    groups = list(dict.fromkeys(r["group"] for r in every))
    names = list(dict.fromkeys(r["estimator"] for r in every))
    for group in groups:
        seen = any(is_ratio(r["snr"]) for r in every if r["group"] == group)
        require(seen, "stages", f"a ratio above 0 in group {group}", "none", "leave its records out")
    particles = sorted({r["particles"] for r in every})
    width, height = 1.2 + 2.9 * len(stages), 0.6 + 2.7 * len(groups)
    figure = NotebookFigure(figsize=(max(width, 7.5), height), dpi=DPI, layout="constrained")
    grid = figure.subplots(len(groups), len(stages), sharex=True, sharey="row", squeeze=False)
    for panels, group in zip(grid, groups, strict=True):
        for axes, (title, records) in zip(panels, stages.items(), strict=True):
            for name in names:
                line = [r for r in records if (r["estimator"], r["group"]) == (name, group)]
                several: dict[int, list[float]] = {k: [] for k in particles}
                for r in line:
                    if is_ratio(r["snr"]):
                        several[r["particles"]].append(r["snr"])
                points = {k: ratios for k, ratios in several.items() if ratios}
                means, low, high = (
                    [of(ratios) for ratios in points.values()] for of in (statistics.fmean, min, max)
                )
                # Estimators may agree to the last bit: with open markers and thin lines both are visible.
                number = names.index(name)
                marker, colour = "osD^v<>P"[number % 8], f"C{number}"
                axes.plot([*points], means, "-", c=colour, marker=marker, mfc="none", ms=7, label=name)
                if len(line) > len(points):
                    axes.fill_between([*points], low, high, color=colour, alpha=0.15, lw=0)
            if floor:
                axes.axhline(floor, color="k", ls=":", label="shown by noise alone")
            axes.set(xscale="log", yscale="log", title=f"{group} gradient: {title}")
            axes.title.set(fontsize=10, parse_math=False)
            axes.set_xticks(particles, particles)
            axes.set_xticks([], minor=True)
            axes.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}")
            axes.set_yticks([], minor=True)
            plain(axes)
        panels[0].set_ylabel("signal / noise of a draw\n(higher is better)")
    for axes in grid[-1]:
        axes.set_xlabel("particles")
    lines = figure.axes[0].get_lines()
    legend(figure, lines, [str(line.get_label()) for line in lines], loc="outside upper center", ncols=6)
    return figure
