"""KL: ELBOs that take the KL of each latent site by itself, in closed form where that is right."""

import math
from numbers import Real
from typing import Any, cast

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_vae.elbos.objective import Objective, Run
from pyro_vae.elbos.score_function import by_score, gain
from pyro_vae.programs.pair import Program
from pyro_vae.programs.traces import (
    Site,
    data_plate,
    family,
    innermost,
    latent_sites,
    per_datum,
    sample_sites,
)


class MeanField(Objective):
    """The ELBO with the KL of each latent site in closed form where that is right, else at the draw.

    It is right where all latents that the model draws before the site are drawn before it in the guide too,
    and a closed form is registered for the two families. So a guide that draws the other way round
    (bottom-up), where ``TraceMeanField_ELBO`` is wrong, costs noise here and no bias.

    A draw that is not reparameterised adds its score to the gradient, times its datum's ELBO less the mean
    of the other particles'.

    Args:
        num_particles: the number of draws to average over.
        vectorize_particles: draw the particles side by side where the pair takes it.

    Raises:
        ValueError: from a run, if a latent site is not reparameterised, and a site stands outside the plate
            "data" or in a subsampled plate inside it: then use ``Trace_ELBO``.

    References:
        Kingma and Welling 2013, arXiv 1312.6114, appendix B; Mnih and Rezende 2016, arXiv 1602.06725.
    """

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss of a batch in nats, ``()``, whose gradient is the estimator's."""
        runs = self._runs(model, guide, args, kwargs)
        kls = [_kls(run) for run in runs]
        elbo: Any = 0.0
        for run, of_run in zip(runs, kls, strict=True):
            elbo = elbo + _without_kl(run)
            for name, kl in of_run.items():
                q = run.guide.nodes[name]
                elbo = elbo - scale_and_mask(kl, scale=q["scale"], mask=q["mask"]).sum()
        elbo = elbo / self.num_particles
        score = torch.cat([run.score() for run in runs])
        if score.requires_grad:
            elbo = elbo + by_score(gain(_elbo_of_draws(runs, kls), alpha=1), score).sum()
        return -elbo


class FreeBits(Objective):
    r"""The ELBO in which the first nats of every latent are free.

    :math:`\sum_n \log p(x_n | z_n) - N \sum_g \max(\lambda, \frac{1}{N} \sum_n KL_{gn})`: no group of
    latents is pushed below lambda nats, so that it does not collapse early in training. A group is a latent
    site; of one inside a plate within "data", each member of that plate. The mean is over the batch (without
    masked data), and the KL as in :class:`MeanField`. A KL weight multiplies the sum. It is never above the
    ELBO.

    A draw that is not reparameterised adds its score to the gradient, times what the draw adds to the bound.

    Args:
        nats: lambda, free for each group, a datum.
        num_particles: the number of draws to average over.
        vectorize_particles: draw the particles side by side where the pair takes it.

    Raises:
        ValueError: if nats is negative or not finite; from a run, if a latent site stands outside the plate
            "data" or in a subsampled plate inside it, or any site does where a latent one is not
            reparameterised, or if a latent site has a weight for each datum.

    References:
        Kingma et al. 2016, arXiv 1606.04934.
    """

    def __init__(self, nats: float, num_particles: int = 1, *, vectorize_particles: bool = True) -> None:
        super().__init__(num_particles, vectorize_particles=vectorize_particles)
        if not isinstance(nats, Real) or not 0 <= nats < math.inf:
            raise ValueError(f"nats is a finite number that is not negative, got {nats!r}.")
        self.nats: float = float(nats)

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss of a batch in nats, ``()``, whose gradient is the estimator's."""
        runs = self._runs(model, guide, args, kwargs)
        kls = [_kls(run) for run in runs]
        elbo = sum(_without_kl(run) for run in runs)
        for name, site in latent_sites(runs[0].model).items():
            if isinstance(site["scale"], Tensor) and site["scale"].dim():
                raise ValueError(
                    f"Site '{name}' has a weight for each datum. Expected one for all: use scale_latents."
                )
            dims = runs[0].particle_dim, data_plate(name, site).dim
            over = [dim for dim in dims if dim is not None]
            kl = [scale_and_mask(of_run[name], mask=site["mask"]) for of_run in kls]
            there = [scale_and_mask(torch.ones_like(k), mask=site["mask"]) for k in kl]
            total, count = (torch.stack(rows).sum(0).sum(over, keepdim=True) for rows in (kl, there))
            free = self.nats * count
            elbo = elbo - site["scale"] * torch.maximum(total, free).sum()
            for of_run, k in zip(kls, kl, strict=True):  # what each draw adds to the maximum
                of_run[name] = torch.maximum(total, free) - torch.maximum(total - k, free)
        score = torch.cat([run.score() for run in runs])
        if score.requires_grad:
            # The other particles are no baseline: through the maximum, what they add depends on this one.
            elbo = elbo + by_score(_elbo_of_draws(runs, kls), score).sum()
        return -elbo / self.num_particles


def analytic_kl(name: str, p: dict[str, Site], q: dict[str, Site]) -> Tensor | str:
    """Return KL(q || p) of a latent site given its drawn parents, or say why only Monte Carlo is right.

    The closed form takes the expectation over the site alone, all that p is conditioned upon held fixed.
    So all of that has to be drawn before the site in the guide, else it may depend on the draw.

    Args:
        name: of a latent site of both.
        p: the latent sites of the model, replayed on the guide's, in their order.
        q: the latent sites of the guide, in their order.

    Returns:
        In nats, of the site's batch shape, unscaled and without a mask; or the reason, as the end of a
        sentence: "Monte Carlo, because ...".
    """
    before_in_model, before_in_guide = (list(sites)[: list(sites).index(name)] for sites in (p, q))
    late = [parent for parent in before_in_model if parent not in before_in_guide]
    if late:
        return f"the model draws {', '.join(late)} before {name}, and the guide after it"
    try:
        kl = kl_divergence(q[name]["fn"], p[name]["fn"])
    except NotImplementedError:
        families = (family(innermost(site["fn"])) for site in (q[name], p[name]))
        return "no closed form is registered for {} and {}".format(*families)
    return kl.expand(q[name]["fn"].batch_shape)


def _kls(run: Run) -> dict[str, Tensor]:
    """KL(q || p) of each site, of its batch shape: in closed form where that is right, else at the draw."""
    p, q = latent_sites(run.model), latent_sites(run.guide)
    kls = {name: analytic_kl(name, p, q) for name in p}
    return {
        name: kl if isinstance(kl, Tensor) else q[name]["unscaled_log_prob"] - p[name]["unscaled_log_prob"]
        for name, kl in kls.items()
    }


def _elbo_of_draws(runs: list[Run], kls: list[dict[str, Tensor]]) -> Tensor:
    """What each draw has of the ELBO, scaled, with these KLs in place of log q - log p: (K, N)."""
    rows = []
    for run, of_run in zip(runs, kls, strict=True):
        model, dim = run.model.copy(), run.particle_dim
        for name, kl in of_run.items():
            model.nodes[name] = cast(Any, model.nodes[name] | {"unscaled_log_prob": -kl})
        of_p = {name: site["scale"] for name, site in sample_sites(model)}
        of_q = {name: site["scale"] for name, site in sample_sites(run.guide) if name not in of_run}
        rows.append((per_datum(model, of_p, dim) - per_datum(run.guide, of_q, dim)).detach())
    return torch.cat(rows)


def _without_kl(run: Run) -> Any:
    """Sum all that is no latent of the model: observations and factors, less what the guide has besides."""
    latents = latent_sites(run.model)
    p, q = (
        sum(site["log_prob_sum"] for name, site in sample_sites(trace) if name not in latents)
        for trace in (run.model, run.guide)
    )
    return p - q
