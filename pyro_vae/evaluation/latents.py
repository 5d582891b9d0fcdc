"""Latents: what each latent site carries, in nats and in active units, estimated from draws."""

import warnings
from typing import Any, NamedTuple, cast

from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_vae.arguments import whole_number
from pyro_vae.evaluation.checks import check_no_points, check_whole
from pyro_vae.programs import Batch, Pair, Program, Traces, as_args
from pyro_vae.programs.faults import locate
from pyro_vae.programs.traces import (
    EvaluationError,
    Site,
    by_dimension,
    check_latents,
    data_plate,
    latent_sites,
)

# A dimension is active if the variance of its posterior mean over the data is larger (Burda et al. 2015).
_ACTIVE = 0.01
# A site with a smaller KL is collapsed, in nats for each data point.
_COLLAPSED = 0.1


class LatentTerms(NamedTuple):
    """What one latent site carries.

    Attributes:
        kl: E_q[log q(z | .) - log p(z | .)] of every data point, in nats, (N,). Its sum over the sites is
            the KL of the ELBO.
        kl_per_dimension: its parts, averaged over the data, in nats, (D,); None where q or p is not a
            product over dimensions (a full covariance, a flow, a mixture).
        spread: Var_x(E_q[z]), the variance over the data of each dimension's posterior mean, (D,).
        active: whether spread is above 0.01, (D,).
    """

    kl: Tensor
    kl_per_dimension: Tensor | None
    spread: Tensor
    active: Tensor


def latent_terms(
    model: Program, guide: Program, batch: Batch, num_samples: int = 100
) -> dict[str, LatentTerms]:
    r"""Estimate what every latent site carries: its KL, also by dimension, and its active units.

    Everything is by Monte Carlo, so it holds for any pair: with or without a closed form, and for any
    dependencies between the guide's sites. The estimate of the spread is unbiased: it is the variance over
    the data of each mean draw, minus the part that is noise. A thousand data points with a hundred draws each
    give it to a few thousandths. Scales are left out, masks are kept.

    It warns of posterior collapse: a site with no active dimension or a mean KL below 0.1
    nats. Such a site says nothing about x beyond its prior. Lower the weight of the KL at the beginning of
    training, weaken the decoder or drop the site.

    Args:
        model: a Pyro model with all latent sites inside the plate of the data.
        guide: a Pyro guide with all latent sites inside that plate.
        batch: the data, a tensor ``(N, ...)`` or a tuple of the model's arguments, N at least 2.
        num_samples: the number of draws for each data point, at least 2.

    Returns:
        Site name -> its terms.

    Raises:
        ValueError: if there are too few data points or samples, the batch does not fit, a latent site is
            outside the plate of the data, the guide lacks one or has others, a KL is not finite, or an
            autoguide holds the posteriors of other data.

    References:
        Burda et al. 2015, section 5.2, arXiv 1509.00519 (active units).
    """
    num_samples = whole_number("num_samples", num_samples, 2, "pass 100, for 100 draws of each data point")
    pair = Pair(model, guide, as_args(batch))
    sums: dict[str, _Sums] = {}
    with pair.evaluating():
        traces, plate = check_whole(pair)
        if len(pair.args[0]) < 2:
            raise ValueError(
                "batch: expected at least 2 data points, since one has no spread, got 1. To fix: pass more."
            )
        _check_no_auxiliary_sites(traces)
        check_no_points(traces)
        for _ in range(num_samples):
            before = pair.snapshot()
            with pair.isolated(validate=False):
                traces = pair.trace()
            check_latents(*traces, user="latent_terms", sums_out=False)
            in_guide = latent_sites(traces.guide)
            for name, p in latent_sites(traces.model).items():
                sums.setdefault(name, _Sums(plate)).add(name, p, in_guide[name])
            if not all(total.kl.isfinite().all() for total in sums.values()):
                before.restore()
                raise ValueError(locate(pair, "The KL is not finite"))
    found = {name: total.terms(num_samples) for name, total in sums.items()}
    for name, terms in found.items():
        count, kl = int(terms.active.sum()), float(terms.kl.mean())
        if not count or kl < _COLLAPSED:
            warnings.warn(
                f"Posterior collapse at site '{name}': {count} of its {len(terms.active)} dimensions are "
                f"active and its KL is {kl:.3f} nats per data point.",
                stacklevel=2,
            )
    return found


def _check_no_auxiliary_sites(traces: Traces) -> None:
    auxiliary = latent_sites(traces.guide).keys() - latent_sites(traces.model).keys()
    if auxiliary:
        raise EvaluationError(
            f"Site '{min(auxiliary)}' of the guide: expected no auxiliary sites, which autoguides draw, "
            "since the KL of a latent contains no log q of other sites. To fix: use "
            "elbo_terms(model, guide, x).kl, the KL of all sites together."
        )


class _Sums:
    """Sums over the draws of a site, in float64."""

    def __init__(self, plate: str | None) -> None:
        self.plate = plate
        self.kl: Any = 0.0
        self.per_dimension: Any = 0.0
        self.z: Any = 0.0
        self.squares: Any = 0.0

    def add(self, name: str, p: Site, q: Site) -> None:
        self.kl = self.kl + (self._terms(name, q) - self._terms(name, p)).sum(-1)
        if by_dimension(q["fn"]) and by_dimension(p["fn"]):
            difference = self._parts(name, q) - self._parts(name, p)
            self.per_dimension = self.per_dimension + difference.mean(0)
        else:
            self.per_dimension = None
        z = self._rows(name, q, q["value"], q["fn"].event_dim)
        self.z, self.squares = self.z + z, self.squares + z**2

    def _terms(self, name: str, site: Site) -> Tensor:
        """Return the masked log probability of a site: (N, the rest)."""
        return self._rows(name, site, scale_and_mask(site["unscaled_log_prob"], mask=site["mask"]))

    def _parts(self, name: str, site: Site) -> Tensor:
        """Return the masked log probability of every dimension of a site that is a product: (N, D)."""
        fn, mask, event_dim = site["fn"], site["mask"], site["fn"].event_dim
        if isinstance(mask, Tensor):
            mask = mask.reshape(mask.shape + (1,) * event_dim)
        each = fn.base_dist if event_dim else fn
        return self._rows(name, site, scale_and_mask(each.log_prob(site["value"]), mask=mask), event_dim)

    def _rows(self, name: str, site: Site, values: Tensor, event_dim: int = 0) -> Tensor:
        """Return values with one row for each data point: (N, the rest)."""
        dim = cast(int, data_plate(name, site, self.plate).dim)
        rows = values.double().movedim(dim - event_dim, 0)
        return rows.reshape(len(rows), -1)

    def terms(self, draws: int) -> LatentTerms:
        mean = self.z / draws
        noise = (self.squares - draws * mean**2) / (draws - 1)  # Var(z | x)
        spread = mean.var(0) - noise.mean(0) / draws
        parts = None if self.per_dimension is None else self.per_dimension / draws
        return LatentTerms(self.kl / draws, parts, spread, spread > _ACTIVE)
