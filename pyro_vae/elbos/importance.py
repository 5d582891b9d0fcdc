"""Importance: bounds on log p(x) by the weights w = p(x, z) / q(z | x), and their gradients."""

import math
from typing import Any, ClassVar, cast

import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor

from pyro_vae.arguments import finite_number
from pyro_vae.elbos.capabilities import Capabilities
from pyro_vae.elbos.objective import Objective, Run
from pyro_vae.elbos.score_function import bound, by_score, gain, gradient_of
from pyro_vae.programs.masks import same
from pyro_vae.programs.traces import Site, data_plate, latent_sites, per_data_point, sample_sites, twins


class IWAE(Objective):
    r"""The importance-weighted bound, for every data point.

    :math:`L_K = \sum_n \log \frac{1}{K} \sum_k w_{nk}` with
    :math:`w_{nk} = p(x_n, z_{nk}) / q(z_{nk} | x_n)`, z_k from q. It lies between the ELBO (K = 1) and log
    p(x), and rises with K. The scale N / B of a subsampled plate of the data is before the logarithm. Masks
    and nested plates are inside. A discrete site that only the model has, with ``infer={"enumerate":
    "parallel"}``, is summed out exactly.

    Under :func:`~pyro_vae.scale_latents`, :math:`\log w = \log p(x | z) + \beta (\log p(z) - \log q(z | x))`,
    which is the weighted ELBO at K = 1. For beta other than 1 it is no bound on log p(x).

    Draws that are not reparameterised add :math:`\sum_k (L - L_{-k}) \nabla \log q(z_k | x)` to the gradient
    of a data point. Here :math:`L_{-k}` is L with the mean of the other log w in place of the k-th (VIMCO),
    and 0 at K = 1. It depends only on the other draws, so it lowers the noise and adds no bias.

    Args:
        num_particles: K.
        vectorize_particles: draw the particles side by side if the pair can take them.

    Raises:
        ValueError: from a run, if a site is outside the plate of the data or in a subsampled plate inside it,
            or if an observed site has another scale.

    References:
        Burda et al. 2015, arXiv 1509.00519; Mnih and Rezende 2016, arXiv 1602.06725 (VIMCO).
    """

    capabilities: ClassVar = Capabilities(sums_out=True, checks_particles=True)

    def __init__(self, num_particles: int, *, vectorize_particles: bool = True) -> None:
        super().__init__(num_particles, vectorize_particles=vectorize_particles)

    def _bound(self, runs: list[Run]) -> Tensor:
        return _sum_of_bounds(runs)


class Renyi(Objective):
    r"""The variational Renyi bound, for every data point.

    :math:`L_\alpha = \sum_n \frac{1}{1 - \alpha} \log \frac{1}{K} \sum_k w_{nk}^{1 - \alpha}` with the
    weights of :class:`IWAE`. At alpha = 0 it is that bound, and at alpha = 1 the ELBO. It falls with alpha.
    For alpha < 0 it is no lower bound on log p(x): without sampling error it is an upper bound.
    Plates, masks, KL weights and draws without rsample are treated as in :class:`IWAE`.

    Args:
        alpha: any finite number.
        num_particles: K.
        vectorize_particles: draw the particles side by side if the pair can take them.

    Raises:
        ValueError: if alpha is not finite; from a run, as :class:`IWAE`.

    References:
        Li and Turner 2016, arXiv 1602.02311; Mnih and Rezende 2016, arXiv 1602.06725 (VIMCO).
    """

    capabilities: ClassVar = Capabilities(sums_out=True, checks_particles=True)

    def __init__(self, alpha: float, num_particles: int, *, vectorize_particles: bool = True) -> None:
        super().__init__(num_particles, vectorize_particles=vectorize_particles)
        self.alpha = finite_number("alpha", alpha, "0 gives IWAE, 1 the ELBO")

    def _bound(self, runs: list[Run]) -> Tensor:
        return _sum_of_bounds(runs, self.alpha)


class STL(Objective):
    r"""The ELBO with the gradient that sticks the landing.

    The gradient of the ELBO through z contains a score, :math:`\nabla_\phi \log q_\phi(z | x)` at fixed z.
    Its expectation is 0. Without it the guide's gradient has no variance where q is the exact posterior. With
    several latent sites all paths stay, also that of :math:`q(z_2 | z_1)` through z_1. For this, a guide with
    several sites runs a second time with fixed draws. The value is that of ``Trace_ELBO``.

    Args:
        num_particles: the number of draws to average over.
        vectorize_particles: draw the particles side by side if the pair can take them.

    Raises:
        ValueError: from a run, if a latent site is not reparameterised, if a flow of the guide has no
            inverse, or if a second run of the guide draws new noise (Dropout).

    References:
        Roeder et al. 2017, arXiv 1703.09194.
    """

    capabilities: ClassVar = Capabilities(needs_rsample=True, checks_particles=True)

    def _bound(self, runs: list[Run]) -> Tensor:
        elbo: Any = 0.0
        for run in runs:
            fixed = run.guide_at_fixed_draws()
            score = torch.as_tensor(sum(fixed.nodes[name]["log_prob_sum"] for name in latent_sites(fixed)))
            elbo = elbo + run.model.log_prob_sum() - run.guide.log_prob_sum() + gradient_of(score)
        return elbo / self.num_particles


class DReG(Objective):
    r"""The importance-weighted bound with the doubly reparameterised gradient.

    The value is that of :class:`IWAE`, whose guide gradient is lost in noise as K grows. Here the guide
    gradient is
    :math:`\sum_k \tilde w_k^2 \frac{\partial \log w_k}{\partial z_k} \frac{\partial z_k}{\partial \phi}` with
    the normalised weights :math:`\tilde w_k`. It is the same in expectation. The model gradient is still
    :math:`\sum_k \tilde w_k \nabla_\theta \log p_\theta(x, z_k)`. With a KL weight beta,
    :math:`\tilde w^2` becomes :math:`(1 - \beta) \tilde w + \beta \tilde w^2`.

    Args:
        num_particles: K.
        vectorize_particles: draw the particles side by side if the pair can take them.

    Raises:
        ValueError: from a run, as :class:`IWAE` and :class:`STL`; if the latent sites have several weights;
            if data points depend on each other's latents, as through a BatchNorm in training mode.

    References:
        Tucker et al. 2019, arXiv 1810.04152.
    """

    capabilities: ClassVar = Capabilities(sums_out=True, needs_rsample=True, checks_particles=True)
    copies_draws: ClassVar = True

    def __init__(self, num_particles: int, *, vectorize_particles: bool = True) -> None:
        super().__init__(num_particles, vectorize_particles=vectorize_particles)

    def _bound(self, runs: list[Run]) -> Tensor:
        terms = []
        for run in runs:
            ratio, of_p, of_q = _weights(run)
            latents = {name: of_q[name] for name in latent_sites(run.guide)}
            beta = next(iter(latents.values()), 1.0)
            if not all(same(beta, other) for other in latents.values()):
                raise ValueError(
                    f"Latent sites: expected one weight for all, got {latents}. To fix: use scale_latents."
                )
            weighted = ((run.model, of_p), (run.guide, of_q), (run.guide_at_fixed_draws(), latents))
            terms.append(
                [per_data_point(trace, weights, run.data, run.particle_dim) for trace, weights in weighted]
            )
        log_p, log_q, score = (torch.cat(rows) for rows in zip(*terms, strict=True))
        log_w = log_p - log_q
        if is_validation_enabled() and log_w.requires_grad:
            _check_independent(runs, log_w)
        w = log_w.detach().softmax(0)
        path = 1 - beta * (1 - w)  # times w: the weight of the gradient that passes through z
        for run, factor in zip(runs, path.split(len(terms[0][0])), strict=True):
            _scale_gradients_through_latents(run, factor)
        surrogate = w * (log_p - path * (log_q - score))
        return ratio * (bound(log_w.detach()).sum() + gradient_of(surrogate.sum()))


def _sum_of_bounds(runs: list[Run], alpha: float = 0.0) -> Tensor:
    """Return the bound of all data, (), with its whole gradient."""
    rows = []
    for run in runs:
        ratio, of_p, of_q = _weights(run)
        plates = run.data, run.particle_dim
        rows.append(per_data_point(run.model, of_p, *plates) - per_data_point(run.guide, of_q, *plates))
    log_w, score = torch.cat(rows), torch.cat([run.score() for run in runs])
    bounds = bound(log_w, alpha)
    if score.requires_grad:
        bounds = bounds + by_score(gain(log_w.detach(), alpha), score)
    return ratio * bounds.sum()


def _weights(run: Run) -> tuple[float, dict[str, Any], dict[str, Any]]:
    """Return the scale N / B of the plate of the data, and each site's other weight, in model and guide."""
    ratios = set()
    weights: list[dict[str, Any]] = []
    for trace in (run.model, run.guide):
        weights.append({})
        for name, site in sample_sites(trace):
            frame = data_plate(name, site, run.data)
            ratio = (frame.full_size or frame.size) / frame.size
            weight = site["scale"] / ratio
            if site["is_observed"] and (isinstance(weight, Tensor) or not math.isclose(weight, 1)):
                raise ValueError(
                    f"Site '{name}', observed: expected the scale {ratio} of its plate '{frame.name}', got "
                    f"{site['scale']}. Another scale would be inside the logarithm. To fix: scale the "
                    "latent sites instead, with scale_latents."
                )
            ratios.add(ratio)
            if "_enumerate_dim" in site["infer"]:
                _check_summed_out(name, site, weight, frame.name)
            weights[-1][name] = weight
    if len(ratios) > 1:
        raise ValueError(
            f"The plate '{run.data}': expected one scale for all sites, got {sorted(ratios)}. To fix: give "
            "it the same size and subsample_size in model and guide."
        )
    return ratios.pop() if ratios else 1.0, weights[0], weights[1]


def _check_summed_out(name: str, site: Site, weight: Any, plate: str) -> None:
    inner = {frame.name for frame in site["cond_indep_stack"]} - {plate, "_particles"}
    if inner or isinstance(weight, Tensor) or not math.isclose(weight, 1):
        raise ValueError(
            f"Site '{name}', to be summed out of the model: expected no KL weight and no plate besides "
            f"'{plate}', got the weight {weight} and the plates {sorted(inner)}. To fix: use TraceEnum_ELBO."
        )


def _check_independent(runs: list[Run], log_w: Tensor) -> None:
    """Refuse weights of data points that depend on the latents of other data points."""
    draws = [
        (site["value"], cast(int, data_plate(name, site, run.data).dim) - site["fn"].event_dim)
        for run in runs
        for name, site in latent_sites(run.guide).items()
        if site["value"].requires_grad
    ]
    if not draws:
        return
    # d log w of data points 0, 2, 4, ... by the latents of 1, 3, 5, ...
    gradients = torch.autograd.grad(
        log_w[:, ::2].sum(), [draw for draw, _ in draws], retain_graph=True, allow_unused=True
    )
    for gradient, (_, dim) in zip(gradients, draws, strict=True):
        if gradient is not None and (gradient.movedim(dim, 0)[1::2].abs() > 0).any():
            raise ValueError(
                "Model and guide: expected that each data point depends only on its own latents, since DReG "
                "weights the gradient of each one separately, got a pair that mixes them, as BatchNorm in "
                "training mode does. To fix: use eval mode for that layer, or IWAE."
            )


def _scale_gradients_through_latents(run: Run, factor: Tensor) -> None:
    """Multiply gradients that come back from the model through its latents by a factor, (particles, N)."""
    for name, site in latent_sites(run.model).items():
        for draw in (site["value"], *twins(site["value"]).values()):
            if not draw.requires_grad:
                continue
            data_dim = cast(int, data_plate(name, site, run.data).dim)
            shape = [1] * -(run.particle_dim or data_dim)
            shape[data_dim] = factor.shape[1]
            shape[0] *= factor.shape[0]
            scale = factor.reshape(shape + [1] * site["fn"].event_dim)
            draw.register_hook(lambda gradient, scale=scale: gradient * scale)
