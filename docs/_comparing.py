"""Tables and figures of the page on comparing ELBOs, from the record of examples/compare_elbos.py."""

import runpy
from pathlib import Path

from _records import is_table, plain, table


def comparison(record: dict) -> dict[str, str]:
    """Return the text and tables of the page "Comparing ELBO estimators", and save its figures."""
    root = Path(__file__).parent
    folder = root / "_build" / "compare"
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in runpy.run_path(str(root.parent / "examples" / "compare_elbos.py"))["figures"](
        record
    ).items():
        figure.savefig(folder / f"{name}.png", bbox_inches="tight")
    settings = "; ".join(f"{k}: {plain(v)}" for k, v in record.items() if k != "command" and not is_table(v))
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
    return {"compare_run": run, **{name: "\n".join(table(of)) for name, of in tables.items()}}
