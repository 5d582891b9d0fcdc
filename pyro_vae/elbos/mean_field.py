"""Mean field: ELBOs that take the KL of each latent site separately, in closed form where that is right."""

from typing import Any, ClassVar, cast

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_vae.arguments import given, is_finite, require
from pyro_vae.elbos.analytic_kl import analytic_kl
from pyro_vae.elbos.capabilities import AnalyticKL, Capabilities
from pyro_vae.elbos.objective import Objective, Run
from pyro_vae.elbos.score_function import by_score, gain
from pyro_vae.programs.traces import data_plate, latent_sites, per_data_point, sample_sites


class MeanField(Objective):
    """The ELBO with the KL of each latent site in closed form where that is right, else at the draw.

    The closed form needs two conditions. It is registered for the two families. Also, every latent that the
    model draws before the site is drawn before it in the guide. A guide in the opposite order (bottom-up)
    makes ``TraceMeanField_ELBO`` wrong. Here it adds noise, but no bias.

    A draw that is not reparameterised adds its score to the gradient, times a factor. The factor is the ELBO
    of its data point minus the mean ELBO of the other particles.

    Args:
        num_particles: the number of draws to average over.
        vectorize_particles: draw the particles side by side if the pair can take them.

    Raises:
        ValueError: from a run, if a latent site is not reparameterised and a site is outside the plate
            of the data or in a subsampled plate inside it. Then use ``Trace_ELBO``.

    References:
        Kingma and Welling 2013, arXiv 1312.6114, appendix B; Mnih and Rezende 2016, arXiv 1602.06725.
    """

    capabilities: ClassVar = Capabilities(analytic_kl=AnalyticKL.WHERE_RIGHT, checks_particles=True)

    def _bound(self, runs: list[Run]) -> Tensor:
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
        return cast(Tensor, elbo)


class FreeBits(Objective):
    r"""The ELBO in which the first nats of the KL of every latent are free.

    :math:`\sum_n \log p(x_n | z_n) - N \sum_g \max(\lambda, \frac{1}{N} \sum_n KL_{gn})`. The objective
    pushes no group of latents below lambda nats, so none collapses early in training. A group is a latent
    site. If the site is in a plate inside that of the data, each member of that plate is a group. The mean is
    over the batch (without masked data), and the KL is that of :class:`MeanField`. A KL weight multiplies the
    sum. The bound is never above the ELBO.

    A draw that is not reparameterised adds its score to the gradient, times what the draw adds to the bound.

    Args:
        nats: lambda, free for each group and data point.
        num_particles: the number of draws to average over.
        vectorize_particles: draw the particles side by side if the pair can take them.

    Raises:
        ValueError: if nats is negative or not finite; from a run, if a latent site is outside the plate
            of the data or in a subsampled plate inside it, or if a latent site has a weight for each data
            point. If a latent site is not reparameterised, the rule about plates holds for every site.

    References:
        Kingma et al. 2016, arXiv 1606.04934.
    """

    capabilities: ClassVar = Capabilities(analytic_kl=AnalyticKL.WHERE_RIGHT, checks_particles=True)

    def __init__(self, nats: float, num_particles: int = 1, *, vectorize_particles: bool = True) -> None:
        super().__init__(num_particles, vectorize_particles=vectorize_particles)
        valid, expected = is_finite(nats) and nats >= 0, "a finite number that is not negative"
        require(valid, "nats", expected, given(nats), "0 gives the ELBO")
        self.nats = float(nats)

    @property
    def without_free_nats(self) -> MeanField:
        """The ELBO without free nats."""
        return MeanField(self.num_particles, vectorize_particles=self.vectorize_particles)

    def _bound(self, runs: list[Run]) -> Tensor:
        kls = [_kls(run) for run in runs]
        elbo = sum(_without_kl(run) for run in runs)
        for name, site in latent_sites(runs[0].model).items():
            if isinstance(site["scale"], Tensor) and site["scale"].dim():
                raise ValueError(
                    f"Site '{name}': expected one weight for all data, got one for each data point. To fix: "
                    "use scale_latents."
                )
            dims = runs[0].particle_dim, data_plate(name, site, runs[0].data).dim
            over = [dim for dim in dims if dim is not None]
            kl = [scale_and_mask(of_run[name], mask=site["mask"]) for of_run in kls]
            counted = [scale_and_mask(torch.ones_like(k), mask=site["mask"]) for k in kl]
            total, count = (torch.stack(rows).sum(0).sum(over, keepdim=True) for rows in (kl, counted))
            free = self.nats * count
            elbo = elbo - site["scale"] * torch.maximum(total, free).sum()
            for of_run, k in zip(kls, kl, strict=True):  # what each draw adds to the maximum
                of_run[name] = torch.maximum(total, free) - torch.maximum(total - k, free)
        score = torch.cat([run.score() for run in runs])
        if score.requires_grad:
            # The other particles are no baseline: through the maximum, their parts depend on this one.
            elbo = elbo + by_score(_elbo_of_draws(runs, kls), score).sum()
        return cast(Tensor, elbo / self.num_particles)


def _kls(run: Run) -> dict[str, Tensor]:
    """Return KL(q || p) of each site, of its batch shape: in closed form where right, else at the draw."""
    p, q = latent_sites(run.model), latent_sites(run.guide)
    kls = {name: analytic_kl(name, p, q) for name in p}
    return {
        name: kl if isinstance(kl, Tensor) else q[name]["unscaled_log_prob"] - p[name]["unscaled_log_prob"]
        for name, kl in kls.items()
    }


def _elbo_of_draws(runs: list[Run], kls: list[dict[str, Tensor]]) -> Tensor:
    """Return the scaled ELBO of each draw and data point, with these KLs for log q - log p: (K, N)."""
    rows = []
    for run, of_run in zip(runs, kls, strict=True):
        model, plates = run.model.copy(), (run.data, run.particle_dim)
        for name, kl in of_run.items():
            model.nodes[name] = cast(Any, model.nodes[name] | {"unscaled_log_prob": -kl})
        of_p = {name: site["scale"] for name, site in sample_sites(model)}
        of_q = {name: site["scale"] for name, site in sample_sites(run.guide) if name not in of_run}
        rows.append(
            (per_data_point(model, of_p, *plates) - per_data_point(run.guide, of_q, *plates)).detach()
        )
    return torch.cat(rows)


def _without_kl(run: Run) -> Any:
    """Sum log p of observations and factors, minus log q of auxiliary sites: all but the model's latents."""
    latents = latent_sites(run.model)
    p, q = (
        sum(site["log_prob_sum"] for name, site in sample_sites(trace) if name not in latents)
        for trace in (run.model, run.guide)
    )
    return p - q
