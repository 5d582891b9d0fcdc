"""A large batch in parts: what belongs to each data point is cut, what all data share is not."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import nn

import pyro_vae as pv
from pyro_vae.evaluation import weights

N, D = 12, 3
X, Y = torch.randn(N, D), torch.randn(N, 1)
TABLE = torch.randn(N, N)  # it happens to have as many rows as there are data


class Shifted(PyroModule):
    """x ~ N(z + its shift, 1) with z at the mean of its guide, so that each number is known exactly.

    Args:
        shift: (x, the other arguments) -> what to add to z, ``(len(x), D)``.
    """

    def __init__(self, shift):
        super().__init__()
        self.free = nn.Parameter(torch.zeros(D))
        self.shift = shift
        self.seen: set[int] = set()

    def forward(self, x, *others):
        self.seen.add(len(x))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Delta(self.free, event_dim=1).expand([len(x)]))
            pyro.sample("x", dist.Normal(z + self.shift(x, *others), 1.0).to_event(1), obs=x)


class Point(PyroModule):
    """The guide: the same point."""

    def forward(self, x, *others):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(torch.zeros(D), event_dim=1).expand([len(x)]))


def looked_up(x, row, table):
    """Return a row of the table for each data point."""
    assert len(row) == len(x)
    return table[row[:, 0]]


ROW = torch.arange(N)[:, None]
# name: (the other arguments, the shift of a program that takes them)
CASES = {
    "a tensor": ((Y,), lambda x, y: y + 0 * x),
    "a tuple": (((Y, "label"),), lambda x, pair: pair[0] + 0 * x),
    "a dict in a list": (([{"y": Y}],), lambda x, parts: parts[0]["y"] + 0 * x),
    "a shared table": ((TABLE[:, :D],), lambda x, table: table.mean(0) + 0 * x),
    "rows of a shared table": ((ROW, TABLE[:, :D]), looked_up),
    "rows of a shared table in a dict": (
        ({"row": ROW, "table": TABLE[:, :D]},),
        lambda x, of: looked_up(x, **of),
    ),
    "a square matrix": ((Y, TABLE), lambda x, y, table: y * table.sum() + 0 * x),
}


@pytest.mark.parametrize("rows", [1, 4, 5])
@pytest.mark.parametrize("tool", ["elbo_terms", "log_evidence"])
@pytest.mark.parametrize(("others", "shift"), CASES.values(), ids=CASES)
def test_each_data_point_gets_its_own_number(others, shift, tool, rows, monkeypatch):
    model, guide = Shifted(shift), Point()
    expected = shift(X, *others)
    monkeypatch.setattr(weights, "ROWS", rows)
    if tool == "elbo_terms":
        found = pv.elbo_terms(model, guide, (X, *others)).elbo
    else:
        found = pv.log_evidence(model, guide, (X, *others), 1).values
    torch.testing.assert_close(found, dist.Normal(expected, 1.0).log_prob(X).sum(-1))
    assert min(model.seen) <= rows  # it was cut
