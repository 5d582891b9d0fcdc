"""KL decomposition: which part of a latent's KL is information about x, and which is a poor prior."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from pyro_vae.arguments import whole_number
from pyro_vae.evaluation.checks import check_no_points, check_whole
from pyro_vae.programs import Batch, Pair, Program, Traces, as_args
from pyro_vae.programs.dependencies import check_alone
from pyro_vae.programs.faults import locate
from pyro_vae.programs.masks import inner_mask
from pyro_vae.programs.traces import (
    EvaluationError,
    Site,
    by_dimension,
    check_latents,
    data_plate,
    latent_sites,
)
from pyro_vae.table import Table

_NUMBERS = 2**22  # of log densities in memory at once


class KLDecomposition(NamedTuple):
    """The parts of the mean KL of one latent site. ``print`` and a notebook show them.

    Attributes:
        kl: E_x KL(q(z | x) || p(z)) = mutual_information + marginal_kl, in nats, ().
        mutual_information: E log q(z | x) - log q(z), what z says about its data point, in nats, (). It is at
            most log N.
        marginal_kl: KL(q(z) || p(z)), total_correlation + the sum of dimension_kl, in nats, ().
        total_correlation: KL(q(z) || prod_j q(z_j)), in nats, (); None where q or p is not a product over
            dimensions.
        dimension_kl: KL(q(z_j) || p(z_j)) of every dimension, in nats, (D,); None in the same case.
        standard_error: name of a field above -> its standard error, over the data and their draws together.
    """

    kl: Tensor
    mutual_information: Tensor
    marginal_kl: Tensor
    total_correlation: Tensor | None
    dimension_kl: Tensor | None
    standard_error: dict[str, Tensor]

    def __str__(self) -> str:
        return str(self._table())

    def _repr_html_(self) -> str:
        return self._table()._repr_html_()

    def _table(self) -> Table:
        names = ["kl", "mutual_information", "marginal_kl", "total_correlation"]
        rows = [
            (name.replace("_", " "), f"{getattr(self, name):.3f} ± {self.standard_error[name]:.3f}")
            for name in names
            if name in self.standard_error
        ]
        return Table("parts of the KL", [("", "nats per data point"), *rows])


def kl_decomposition(
    model: Program, guide: Program, batch: Batch, num_samples: int = 1
) -> dict[str, KLDecomposition]:
    r"""Split the mean KL of every latent into mutual information, total correlation and KL by dimension.

    :math:`E_x KL(q(z|x) \| p(z)) = I(x; z) + KL(q(z) \| \prod_j q(z_j)) + \sum_j KL(q(z_j) \| p(z_j))`, where
    :math:`q(z) = \frac{1}{N} \sum_n q(z | x_n)` is the average posterior of *these* N data points. For them
    it is exact, and costs N^2 log densities per draw. For all data it is an estimate. The mutual information
    of N data points cannot exceed log N. If it comes near, take a few thousand data points.

    A mutual information of 0 is a collapsed posterior. A large KL(q(z) || p(z)) is a prior that draws
    latents which no data point has. Then samples are poor with any decoder. A total correlation of 0 is a
    code with independent dimensions.

    Args:
        model: a Pyro model with all latent sites inside the plate of the data.
        guide: a Pyro guide with all latent sites inside that plate.
        batch: the data, a tensor ``(N, ...)`` or a tuple of the model's arguments, N at least 2.
        num_samples: the number of draws for each data point.

    Returns:
        Site name -> its parts.

    Raises:
        ValueError: if a latent's distribution depends on another latent, in model or guide; if a latent has a
            mask; if there are too few data points, the batch does not fit, the guide lacks a latent or has
            others, or a KL is not finite.

    References:
        Hoffman and Johnson 2016, ELBO surgery; Chen et al. 2018, Isolating Sources of Disentanglement in
        VAEs, arXiv 1802.04942.
    """
    num_samples = whole_number("num_samples", num_samples, 1, "pass 1, for one draw of each data point")
    pair = Pair(model, guide, as_args(batch))
    draws: dict[str, list[dict[str, Tensor]]] = {}
    with pair.evaluating():
        traces, plate = check_whole(pair)
        num_data = len(pair.args[0])
        if num_data < 2:
            raise ValueError(
                "batch: expected at least 2 data points, since q(z) is the average of their posteriors, got "
                "1. To fix: pass more, such as 1000."
            )
        _check_sites(traces)
        check_no_points(traces)
        check_alone(pair, traces, model=True)
        _check_one_prior(traces, plate)
        for _ in range(num_samples):
            before = pair.snapshot()
            with pair.isolated(validate=False):
                traces = pair.trace()
            in_model = latent_sites(traces.model)
            for name, q in latent_sites(traces.guide).items():
                terms = _terms(_OfData(name, q, plate), _OfData(name, in_model[name], plate), num_data)
                if not terms["kl"].isfinite().all():
                    before.restore()
                    raise ValueError(locate(pair, "The KL is not finite"))
                draws.setdefault(name, []).append(terms)
    return {name: _mean(several) for name, several in draws.items()}


class _OfData:
    """The distribution of a site and its draws, with one row for each data point."""

    def __init__(self, name: str, site: Site, plate: str | None) -> None:
        self.fn: Any = site["fn"]
        self.value: Tensor = site["value"]
        self.dim = cast(int, data_plate(name, site, plate).dim)
        self.each = by_dimension(self.fn)

    def own(self, fn: Any) -> Tensor:
        """Return log densities of draws under the distribution of their data point, (N, the rest)."""
        log_q = fn.log_prob(self.value)
        return self._rows(log_q, fn, 0).flatten(1)

    def of_all(self, fn: Any) -> Iterator[Tensor]:
        """Yield log densities of some draws under the distributions of all data, (draws, N, the rest)."""
        place = self.dim - self.fn.event_dim
        draws = self.value.movedim(place, 0)
        for some in draws.split(max(1, _NUMBERS // draws.numel())):
            log_q = fn.log_prob(some.unsqueeze(place))
            yield self._rows(log_q, fn, 1).flatten(2)

    def _rows(self, log_prob: Tensor, fn: Any, place: int) -> Tensor:
        """Move the data from their place among the batch dimensions of fn to another one."""
        inner = self.fn.event_dim - fn.event_dim  # dimensions of the event that fn takes one by one
        moved = log_prob.double().movedim(self.dim - inner, place)
        return moved.unsqueeze(-1)


def _terms(q: _OfData, p: _OfData, num_data: int) -> dict[str, Tensor]:
    """Return the parts of the KL at one draw for each data point, (N,), and by dimension (N, D)."""

    def average(log_q: Tensor) -> Tensor:
        return log_q.logsumexp(1) - math.log(num_data)  # q(z) of the data

    own, prior = q.own(q.fn).sum(-1), p.own(p.fn).sum(-1)
    marginal = torch.cat([average(log_q.sum(-1)) for log_q in q.of_all(q.fn)])
    terms = {"kl": own - prior, "mutual_information": own - marginal, "marginal_kl": marginal - prior}
    if q.each and p.each:
        each = torch.cat([average(log_q) for log_q in q.of_all(q.each)])  # q(z_j)
        terms["total_correlation"] = marginal - each.sum(-1)
        terms["dimension_kl"] = each - p.own(p.each)
    return terms


def _mean(draws: list[dict[str, Tensor]]) -> KLDecomposition:
    """Return means over data and draws, with standard errors over the data."""
    of_data = {name: torch.stack([draw[name] for draw in draws]).mean(0) for name in draws[0]}
    means = {name: values.mean(0) for name, values in of_data.items()}
    errors = {name: values.std(0) / math.sqrt(len(values)) for name, values in of_data.items()}
    return KLDecomposition(
        means["kl"],
        means["mutual_information"],
        means["marginal_kl"],
        means.get("total_correlation"),
        means.get("dimension_kl"),
        errors,
    )


def _check_one_prior(traces: Traces, plate: str | None) -> None:
    """Refuse a prior that differs between data points: then q(z) of all data belongs to none of them."""
    for name, site in latent_sites(traces.model).items():
        p = _OfData(name, site, plate)
        value = p.value.roll(1, p.dim - p.fn.event_dim)
        if not torch.allclose(p.fn.log_prob(value), p.fn.log_prob(p.value).roll(1, p.dim), 1e-4, 1e-4):
            raise EvaluationError(
                f"Site '{name}' of the model: expected one prior for all data, to compare with the average "
                "of their posteriors, got one that depends on the data point. To fix: pass the data of one "
                "condition."
            )


def _check_sites(traces: Traces) -> None:
    check_latents(*traces, user="kl_decomposition", sums_out=False)
    auxiliary = latent_sites(traces.guide).keys() - latent_sites(traces.model).keys()
    masked = [
        name
        for trace in traces
        for name, site in latent_sites(trace).items()
        if isinstance(site["mask"], Tensor) or site["mask"] is False or inner_mask(site["fn"]) is not None
    ]
    if auxiliary or masked:
        what = "auxiliary sites, which autoguides draw" if auxiliary else "masks on latents"
        raise EvaluationError(
            f"Site '{min(auxiliary or masked)}': expected no {what}, since they have no q(z) of all data. To "
            "fix: take latent_terms for masked sites, and elbo_terms for auxiliary ones."
        )
