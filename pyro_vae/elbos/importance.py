"""Importance: bounds on log p(x) by the weights w = p(x, z) / q(z | x), and their gradients."""

import math
from numbers import Real
from typing import Any, cast

import torch
from torch import Tensor

from pyro_vae.elbos.objective import Objective, Run, same
from pyro_vae.elbos.score_function import bound, by_score, gain, gradient_of
from pyro_vae.programs.pair import Program
from pyro_vae.programs.traces import Site, data_plate, latent_sites, per_datum, sample_sites


class IWAE(Objective):
    r"""The importance-weighted bound, for every datum.

    :math:`L_K = \sum_n \log \frac{1}{K} \sum_k w_{nk}` with
    :math:`w_{nk} = p(x_n, z_{nk}) / q(z_{nk} | x_n)`, z_k from q: between the ELBO (K = 1) and log p(x), and
    rising with K. The scale N / B of a subsampled plate "data" stands before the logarithm, masks and nested
    plates within. A discrete site that the model alone has, with ``infer={"enumerate": "parallel"}``, is
    summed out exactly.

    Under :func:`~pyro_vae.scale_latents`, :math:`\log w = \log p(x | z) + \beta (\log p(z) - \log q(z | x))`,
    which is the weighted ELBO at K = 1. For beta other than 1 it is no bound on log p(x).

    Draws that are not reparameterised add :math:`\sum_k (L - L_{-k}) \nabla \log q(z_k | x)` to the gradient
    of a datum, where :math:`L_{-k}` is L with the mean of the other log w for the k-th (VIMCO), 0 at K = 1.
    It depends on the other draws alone, so that it takes noise away and adds no bias.

    Args:
        num_particles: K.
        vectorize_particles: draw the particles side by side where the pair takes it.

    Raises:
        ValueError: from a run, if a site stands outside the plate "data" or in a subsampled plate inside it,
            or an observed one is scaled besides.

    References:
        Burda et al. 2015, arXiv 1509.00519; Mnih and Rezende 2016, arXiv 1602.06725 (VIMCO).
    """

    sums_out = True

    def __init__(self, num_particles: int, *, vectorize_particles: bool = True) -> None:
        super().__init__(num_particles, vectorize_particles=vectorize_particles)

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss of a batch in nats, ``()``, whose gradient is the estimator's."""
        return -_bound_of_all(self._runs(model, guide, args, kwargs))


class Renyi(Objective):
    r"""The variational Renyi bound, for every datum.

    :math:`L_\alpha = \sum_n \frac{1}{1 - \alpha} \log \frac{1}{K} \sum_k w_{nk}^{1 - \alpha}` with the
    weights of :class:`IWAE`, which it is at alpha 0; at 1 it is the ELBO. It falls with alpha. Plates, masks,
    KL weights and draws without rsample are as there.

    Args:
        alpha: any finite number.
        num_particles: K.
        vectorize_particles: draw the particles side by side where the pair takes it.

    Raises:
        ValueError: if alpha is not finite; from a run, as :class:`IWAE`.

    References:
        Li and Turner 2016, arXiv 1602.02311; Mnih and Rezende 2016, arXiv 1602.06725 (VIMCO).
    """

    sums_out = True

    def __init__(self, alpha: float, num_particles: int, *, vectorize_particles: bool = True) -> None:
        super().__init__(num_particles, vectorize_particles=vectorize_particles)
        if not isinstance(alpha, Real) or not math.isfinite(alpha):
            raise ValueError(f"alpha is a finite number, got {alpha!r}.")
        self.alpha: float = float(alpha)

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss of a batch in nats, ``()``, whose gradient is the estimator's."""
        return -_bound_of_all(self._runs(model, guide, args, kwargs), self.alpha)


class STL(Objective):
    r"""The ELBO with the gradient that sticks the landing.

    The gradient of the ELBO through z holds a score, :math:`\nabla_\phi \log q_\phi(z | x)` at fixed z, of
    expectation 0. Without it the gradient has no variance where q is the exact posterior. With several latent
    sites the paths stay: that of :math:`q(z_2 | z_1)` through z_1 too. For this a guide of several sites is
    run a second time, with its draws held fixed. The value is that of ``Trace_ELBO``.

    Args:
        num_particles: the number of draws to average over.
        vectorize_particles: draw the particles side by side where the pair takes it.

    Raises:
        ValueError: from a run, if a latent site is not reparameterised, or a guide of several sites draws
            noise besides them (Dropout).

    References:
        Roeder et al. 2017, arXiv 1703.09194.
    """

    needs_paths = True

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss of a batch in nats, ``()``, whose gradient is the estimator's."""
        elbo: Any = 0.0
        for run in self._runs(model, guide, args, kwargs):
            held = run.held()
            score = torch.as_tensor(sum(held.nodes[name]["log_prob_sum"] for name in latent_sites(held)))
            elbo = elbo + run.model.log_prob_sum() - run.guide.log_prob_sum() + gradient_of(score)
        return -elbo / self.num_particles


class DReG(Objective):
    r"""The importance-weighted bound with the doubly reparameterised gradient.

    The value is that of :class:`IWAE`, whose gradient for the guide drowns in noise as K grows. Here it is
    :math:`\sum_k \tilde w_k^2 \frac{\partial \log w_k}{\partial z_k} \frac{\partial z_k}{\partial \phi}` with
    the normalised weights :math:`\tilde w_k`, and the model's stays
    :math:`\sum_k \tilde w_k \nabla_\theta \log p_\theta(x, z_k)`: the same in expectation. With a KL weight
    beta, :math:`\tilde w^2` becomes :math:`(1 - \beta) \tilde w + \beta \tilde w^2`.

    Args:
        num_particles: K.
        vectorize_particles: draw the particles side by side where the pair takes it.

    Raises:
        ValueError: from a run, as :class:`IWAE` and :class:`STL`; if the latent sites have several weights.

    References:
        Tucker et al. 2019, arXiv 1810.04152.
    """

    sums_out = True
    needs_paths = True

    def __init__(self, num_particles: int, *, vectorize_particles: bool = True) -> None:
        super().__init__(num_particles, vectorize_particles=vectorize_particles)

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss of a batch in nats, ``()``, whose gradient is the estimator's."""
        runs = self._runs(model, guide, args, kwargs)
        terms = []
        for run in runs:
            ratio, of_p, of_q = _weigh(run)
            latents = {name: of_q[name] for name in latent_sites(run.guide)}
            beta = next(iter(latents.values()), 1.0)
            if not all(same(beta, other) for other in latents.values()):
                raise ValueError(
                    f"The latent sites have the weights {latents}. Expected one for all: use scale_latents."
                )
            weighted = ((run.model, of_p), (run.guide, of_q), (run.held(), latents))
            terms.append([per_datum(trace, weights, run.particle_dim) for trace, weights in weighted])
        log_p, log_q, score = (torch.cat(rows) for rows in zip(*terms, strict=True))
        log_w = log_p - log_q
        w = log_w.detach().softmax(0)
        path = 1 - beta * (1 - w)  # times w: the weight of what passes through z
        for run, factor in zip(runs, path.split(len(terms[0][0])), strict=True):
            _scale_gradients(run, factor)
        surrogate = w * (log_p - path * (log_q - score))
        return -ratio * (bound(log_w.detach()).sum() + gradient_of(surrogate.sum()))


def _bound_of_all(runs: list[Run], alpha: float = 0.0) -> Tensor:
    """Return the bound of all data, (), with all of its gradient."""
    rows = []
    for run in runs:
        ratio, of_p, of_q = _weigh(run)
        dim = run.particle_dim
        rows.append(per_datum(run.model, of_p, dim) - per_datum(run.guide, of_q, dim))
    log_w, score = torch.cat(rows), torch.cat([run.score() for run in runs])
    bounds = bound(log_w, alpha)
    if score.requires_grad:
        bounds = bounds + by_score(gain(log_w.detach(), alpha), score)
    return ratio * bounds.sum()


def _weigh(run: Run) -> tuple[float, dict[str, Any], dict[str, Any]]:
    """Return the scale N / B of the plate "data", and each site's weight besides, in model and guide."""
    ratios = set()
    weights: list[dict[str, Any]] = []
    for trace in (run.model, run.guide):
        weights.append({})
        for name, site in sample_sites(trace):
            frame = data_plate(name, site)
            ratio = (frame.full_size or frame.size) / frame.size
            weight = site["scale"] / ratio
            if site["is_observed"] and (isinstance(weight, Tensor) or not math.isclose(weight, 1)):
                raise ValueError(
                    f"The observed site '{name}' is scaled by {site['scale']}, where its plate 'data' "
                    f"scales by {ratio}: a scale within a datum would stand inside the logarithm. Expected "
                    "none: weigh the latent sites, with scale_latents."
                )
            ratios.add(ratio)
            if "_enumerate_dim" in site["infer"]:
                _check_summed_out(name, site, weight)
            weights[-1][name] = weight
    if len(ratios) != 1:
        raise ValueError(
            f"The plates 'data' of model and guide scale by {sorted(ratios)}. Expected one plate for all "
            "sites, with the same size and subsample_size."
        )
    return ratios.pop(), weights[0], weights[1]


def _check_summed_out(name: str, site: Site, weight: Any) -> None:
    inner = {frame.name for frame in site["cond_indep_stack"]} - {"data", "_particles"}
    if inner or isinstance(weight, Tensor) or not math.isclose(weight, 1):
        raise ValueError(
            f"Site '{name}' is to be summed out of the model, with the weight {weight} and in the plates "
            f"{sorted(inner)} besides 'data'. Expected no KL weight and no other plate: use TraceEnum_ELBO."
        )


def _scale_gradients(run: Run, factor: Tensor) -> None:
    """Multiply what comes back from the model through its latents by a factor, (particles, N)."""
    for name, site in latent_sites(run.model).items():
        if site["value"].requires_grad:
            data_dim = cast(int, data_plate(name, site).dim)
            shape = [1] * -(run.particle_dim or data_dim)
            shape[data_dim] = factor.shape[1]
            shape[0] *= factor.shape[0]
            scale = factor.reshape(shape + [1] * site["fn"].event_dim)
            site["value"].register_hook(lambda gradient, scale=scale: gradient * scale)
