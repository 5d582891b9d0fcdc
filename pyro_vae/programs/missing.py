"""mask_missing: NaN in a batch marks missing entries, which no network reads and no density counts."""

import functools
from typing import Any

import torch
from pyro.distributions import MaskedDistribution, Unit
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Independent, constraints, transform_to

from pyro_vae.programs.observations import is_product
from pyro_vae.programs.pair import Pair, Program, leaves, map_leaves
from pyro_vae.programs.traces import Site, innermost, is_plate


class LostNaNError(ValueError):
    """Raised if a model turns NaN into numbers before it observes them, so that they would count."""


def mask_missing(model: Program, guide: Program) -> tuple[Program, Program]:
    r"""Return a pair for data with missing entries, which NaN marks in the batch.

    With :math:`x = (x_o, x_m)`, observed and missing, it is a pair on :math:`x_o` alone:

    - the model observes :math:`p(x_o | z)`, which is :math:`p(x | z)` without the factors of the missing
      entries. So a row without any observed entry has log p = 0;
    - the guide is :math:`q(z | x_o)`, whose networks read 0 for each missing entry.

    The pair has the same modules and works like any other: for :class:`~pyro_vae.SVI` under any ELBO, for
    evaluation and for plots. Under ``IWAE(K)`` its bound is the MIWAE bound. ::

        model, guide = pv.mask_missing(model, guide)
        svi = pv.SVI(model, guide, optimizer, loss=pv.IWAE(20))

    An entry is one number: a pixel, a column. Every observed site has to be a product over its entries given
    z, or a distribution that takes NaN itself, such as ``NanMaskedMultivariateNormal``. The model gets the
    NaN unchanged, and results of NaN are NaN. So it may flatten, cut and standardise x before it observes it.
    Infinity is not missing. On a batch without NaN the pair gives the numbers of the original pair, in a
    compiled graph up to rounding.

    The numbers are right if entries are missing at random. Whether an entry is missing may depend on the
    observed entries, but not on the missing ones.

    Args:
        model: any model.
        guide: its guide.

    Returns:
        The model and the guide, wrapped.

    Raises:
        ValueError: if model or guide is not a program; from a run, if an observed site is not a product over
            its entries, if a network of the model reads NaN, or if the model turns NaN into numbers before it
            observes them, as ``x > 0.5`` does. For a compiled graph, only the first batch is checked for the
            last of these.

    References:
        Rubin 1976 (missing at random); Mattei and Frellsen 2019, arXiv 1812.02633 (MIWAE).
    """
    Pair(model, guide)  # refuses anything but programs
    return functools.partial(_on_observed, model), functools.partial(_on_zeros, guide)


def missing_entries(site: Site) -> Tensor | None:
    """Return which entries of an observed site were left out, of its value's shape; None without any."""
    found: Tensor | None = site["infer"].get("_missing")
    return found


def _on_zeros(guide: Program, *args: Any, **kwargs: Any) -> Any:
    """Run a guide on a batch with 0 for NaN."""
    args, kwargs = map_leaves(
        lambda leaf: leaf.masked_fill(leaf.isnan(), 0) if _may_hold_nan(leaf) else leaf, (args, kwargs)
    )
    return guide(*args, **kwargs)


def _on_observed(model: Program, *args: Any, **kwargs: Any) -> Any:
    """Run a model on a batch with NaN. Its observed sites leave NaN out."""
    with _LeaveOut() as sites:
        result = model(*args, **kwargs)
    in_batch = sum(leaf.isnan().sum() for leaf in leaves((args, kwargs)) if _may_hold_nan(leaf))
    if sites.whole and isinstance(in_batch, Tensor) and _read(in_batch > sites.num_nan, in_a_graph=False):
        raise LostNaNError(
            f"The model: expected every NaN of the batch at an observed site, got {int(sites.num_nan)} of "
            f"{int(in_batch)}: a step such as x > 0.5 or x.long() turns NaN into numbers, which would count. "
            "To fix: take that step earlier, in the data, or keep NaN: torch.where(x.isnan(), x, ...)."
        )
    return result


class _LeaveOut(Messenger):
    """Leaves NaN out at observed sites.

    Attributes:
        num_nan: how often NaN was observed.
        whole: whether something was observed, and no plate drew some of the data.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_nan: int | Tensor = 0
        self._observed = self._subsampled = False
        self._counted: list[Tensor] = []  # a value that several sites observe counts once

    @property
    def whole(self) -> bool:
        return self._observed and not self._subsampled

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] or is_plate(msg) or _has_no_density(msg):
            return
        self._observed = True
        self._subsampled |= any(f.full_size not in (None, f.size) for f in msg["cond_indep_stack"])
        fn, value = msg["fn"], msg["value"]
        if not _may_hold_nan(value):
            return
        missing = missing_entries(msg)
        if missing is None:  # else another mask_missing, inside of this one, left them out
            missing = value.isnan()
            fits = fn.shape()[-value.dim() :] == value.shape
            if fits and is_product(fn) and _read(missing.any(), in_a_graph=True):
                msg["fn"] = _of_entries(fn, ~missing)
                # The filling does not count, but it lies in the support, so that its gradient is a number.
                msg["value"] = torch.where(missing, _inside(fn.support, value), value)
                msg["infer"] = {**msg["infer"], "_missing": missing}
        if not any(value is counted for counted in self._counted):
            self._counted.append(value)
            self.num_nan = self.num_nan + missing.sum()


def _may_hold_nan(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _has_no_density(site: Site) -> bool:
    """Return whether a site is a factor, or a deterministic value."""
    return isinstance(innermost(site["fn"]), Unit) or bool(site["infer"].get("_deterministic"))


def _read(flag: Tensor, *, in_a_graph: bool) -> bool:
    """Return whether a flag is set; a fixed answer during a recording, which cannot read values."""
    try:
        return bool(flag)
    except RuntimeError:
        return in_a_graph


def _of_entries(fn: Any, seen: Tensor) -> Any:
    """Return a product over entries without the factors of the entries that are not seen."""
    if isinstance(fn, Independent):
        return _of_entries(fn.base_dist, seen).to_event(fn.reinterpreted_batch_ndims)
    if isinstance(fn, MaskedDistribution) and fn.event_dim:  # a mask of rows
        return _of_entries(fn.base_dist, seen).mask(fn._mask)
    return fn.mask(seen)


def _inside(support: Any, like: Tensor) -> Tensor:
    """Return values inside a support of single numbers."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    zeros = torch.zeros_like(like)
    if support.is_discrete:
        return zeros + getattr(support, "lower_bound", 0)
    try:
        return transform_to(support)(zeros)
    except NotImplementedError:
        return zeros
