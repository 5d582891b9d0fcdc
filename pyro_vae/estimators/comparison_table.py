"""Comparison: the result of compare_elbos, as records and as tables."""

import math
from typing import Any, NamedTuple

from pyro_vae.table import Table


class Comparison(NamedTuple):
    """The result of comparing estimators: ``print`` and a notebook show tables.

    ``pandas.DataFrame(comparison.records)`` holds all numbers.

    There is one record for each estimator and each group of parameters. Its fields are plain numbers and
    strings. A field is None if it was not asked for, or is not defined.

    ========================= =====================================================================
    field                     meaning
    ========================= =====================================================================
    estimator                 its name
    particles                 its ``num_particles``
    value, value_error        the bound (minus the loss) in nats per data point; its standard error
    value_sd                  the standard deviation of a single draw of the value
    gap, gap_error            log p(x) - value, in nats per data point; the error of the value
    bias, bias_error          value - the target's value, in nats per data point; its standard error
    ms                        median milliseconds for the loss and its gradients
    group                     the name of a group of parameters
    gradient_variance         of the loss per data point: trace of the covariance over the group
    snr                       signal-to-noise ratio: abs(E g) / sd g, averaged over the group's parameters
    snr_per_root_second       snr / sqrt(seconds): the snr of an average over one second of draws
    gradient_bias             norm(mean gradient - target's) / norm(target's); None if that norm is 0
    gradient_bias_error       the root mean square of gradient_bias that noise alone gives
    ========================= =====================================================================

    Attributes:
        records: one dict for each estimator and group.
        num_draws: the number of gradients drawn from each estimator.
        num_data: the number of data points in the loss, by which it is divided.
        evidence: log p(x) as given, in nats per data point, or None.
    """

    records: list[dict[str, Any]]
    num_draws: int
    num_data: int
    evidence: float | None

    @property
    def snr_floor(self) -> float:
        """The snr that this number of draws shows without any signal, sqrt(2 / (pi num_draws))."""
        return math.sqrt(2 / (math.pi * self.num_draws))

    def __str__(self) -> str:
        return "\n\n".join(map(str, self._tables()))

    def _repr_html_(self) -> str:
        return "".join(table._repr_html_() for table in self._tables())

    def _tables(self) -> list[Table]:
        """Return the table of the values, and that of each group's gradient."""
        evidence = "" if self.evidence is None else f"; log p(x) = {self.evidence:.3f}"
        title = f"nats per data point, {self.num_data} data, {self.num_draws} draws of each{evidence}"
        groups: dict[str, list[dict[str, Any]]] = {}
        for record in self.records:
            groups.setdefault(record["group"], []).append(record)
        first = next(iter(groups.values()))
        tables = [Table(title, _rows(first, _VALUE_HEADERS))]
        for group, records in groups.items():
            rows = _rows(records, _GRADIENT_HEADERS)
            tables.append(Table(f"gradient of the loss per data point, {group}", rows))
        notes = [
            "± is a standard error; after a relative bias, the bias that noise alone would show.",
            f"SNR is |E g| / sd g, averaged over parameters: noise alone shows {self.snr_floor:.3f}.",
        ]
        return [*tables[:-1], tables[-1]._replace(notes=notes)]


# field -> column header
_VALUE_HEADERS = {
    "estimator": "estimator",
    "particles": "particles",
    "value": "value",
    "value_sd": "sd of a draw",
    "gap": "gap to log p(x)",
    "bias": "bias",
    "ms": "ms",
}
_GRADIENT_HEADERS = {
    "estimator": "estimator",
    "particles": "particles",
    "snr": "SNR",
    "snr_per_root_second": "SNR/sqrt(s)",
    "gradient_variance": "variance",
    "gradient_bias": "relative bias",
}


def _rows(records: list[dict[str, Any]], headers: dict[str, str]) -> list[list[str]]:
    """Return the rows of a table, the head first, without empty columns."""
    columns = [[header, *(_cell(record, field) for record in records)] for field, header in headers.items()]
    shown = [column for column in columns if any(column[1:])]
    return [list(row) for row in zip(*shown, strict=True)]


def _cell(record: dict[str, Any], field: str) -> str:
    value, error = record[field], record.get(f"{field}_error")
    if value is None:
        return ""
    if isinstance(value, int | str):
        return str(value)
    return f"{value:.4g}" if error is None else f"{value:.3f} ± {error:.3f}"
