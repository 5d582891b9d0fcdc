"""Tables of what a trained pair is worth: annealing beside importance weights, and inference gaps."""

import json
from pathlib import Path

from _records import plain, table

POSTERIORS = {"factorised": "`DiagNormal`", "full": "`FullNormal`", "flow": "`FlowNormal`"}


def annealed(record: dict) -> dict[str, str]:
    """Return the bounds, where both ways agree, and the sandwich."""
    bounds = [
        {
            "images": row["data"],
            "estimator": row["estimator"],
            "log p(x) >=": f"{row['log p(x) >=']:.3f} ± {row['Monte Carlo error']:.3f}",
            "seconds": row["seconds"],
        }
        for row in record["bounds"]
    ]
    agreement = [
        {
            "images with": row["images with"],
            "number": row["images"],
            "annealed - importance weights": number(row["mean"], row["error"]),
        }
        for row in record["agreement"]
    ]
    width = record["sandwich"]["upper - lower"]
    settings = ("protocol", "seed", "unit", "threads", "processor", "torch")
    return {
        "annealed_bounds": "\n".join(table(bounds)),
        "annealed_agreement": "\n".join(table(agreement)),
        "annealed_width": f"{width['mean']:.3f} ± {width['error']:.3f} nats per data point",
        "annealed_run": f"```sh\n{record['command']}\n```\n\n"
        + "; ".join(f"{name}: {plain(record[name])}" for name in settings)
        + ".",
    }


def gaps(folder: Path) -> dict[str, str]:
    """Return the gaps of the three posteriors, and their commands."""
    rows, runs = [], []
    for name, title in POSTERIORS.items():
        record = json.loads((folder / f"{name}.json").read_text())
        parts = [f"{record[part]:.2f} ± {record[f'{part}_error']:.2f}" for part in FIELDS]
        gap = record["log_evidence"] - record["elbo"]
        rows.append(
            dict(zip(["posterior", *FIELDS.values(), "gap"], [title, *parts, f"{gap:.2f}"], strict=True))
        )
        runs.append(record["command"])
    about = (
        f"{record['gap_images']} test images, {record['protocol']}, {record['epochs']} epochs, "
        f"{record['steps']} steps of the search, 1,000 draws, seed {record['seed']}; {record['unit']}, means "
        "with standard errors."
    )
    commands = "\n".join(runs)
    return {"gaps": "\n".join([*table(rows), "", about, "", f"```sh\n{commands}\n```"])}


FIELDS = {
    "log_evidence": "log p(x)",
    "elbo": "ELBO",
    "approximation": "approximation (family)",
    "amortisation": "amortisation (encoder)",
}


def number(mean: float | None, error: float | None) -> str:
    """Return a mean with its error, where there are any."""
    if mean is None:
        return "-"
    return f"{mean:+.3f}" + (f" ± {error:.3f}" if error is not None else "")
