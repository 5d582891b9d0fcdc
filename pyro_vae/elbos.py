"""ELBOs: the objectives that Pyro lacks, from traces alone.

Each is a Pyro ``ELBO``: give it to :class:`~pyro_vae.SVI` or ``pyro.infer.SVI``, compile it with
:class:`~pyro_vae.CompiledELBO`, or call ``elbo(model, guide)`` for a module whose forward is the loss.
Particles are drawn side by side in a plate left of all others where model and guide take it, which is tried
out on the first batch of each shape, and one after the other where they do not.

A gradient passes through a draw of a distribution that has ``rsample``. Where it has none (Categorical,
Bernoulli, Poisson), the gradient is that of the score function; STL and DReG need ``rsample``.
"""

import math
from collections.abc import Hashable
from numbers import Integral, Real
from typing import Any, NamedTuple, cast

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import is_identically_zero, scale_and_mask
from pyro.infer import ELBO
from pyro.infer.util import is_validation_enabled
from pyro.util import check_site_shape, warn_if_nan
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_vae.layouts import Layout, layout
from pyro_vae.pairs import Before, Program, signature, submodules
from pyro_vae.traces import (
    Site,
    data_plate,
    innermost,
    is_plate,
    latent_sites,
    per_datum,
    sample_sites,
    traces,
)


class _Run(NamedTuple):
    """One run of guide and model, and the guide itself, to run again."""

    traces: tuple[poutine.Trace, poutine.Trace]
    program: Program
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def model(self) -> poutine.Trace:
        return self.traces[0]

    @property
    def guide(self) -> poutine.Trace:
        return self.traces[1]

    def held(self) -> poutine.Trace:
        """Trace the guide with its draws held fixed, so that log q depends on its parameters alone."""
        latents = latent_sites(self.guide)
        held = self.guide.copy()
        for name, site in latents.items():
            kept = {key: value for key, value in site.items() if "log_prob" not in key}
            held.nodes[name] = cast(Any, kept | {"value": site["value"].detach()})
        # What follows upon a draw has to be made anew from the fixed one; the only draw has nothing after it.
        if len(latents) > 1:
            before = Before(self.program)
            held = poutine.trace(poutine.replay(self.program, trace=held)).get_trace(
                *self.args, **self.kwargs
            )
            before.restore_buffers()
            if before.random_state_moved():
                raise ValueError(
                    "The guide draws noise besides its latent sites (Dropout, say), so a second run with "
                    "the same latents is another guide. Expected none: take it out of the guide, or use "
                    "IWAE or Trace_ELBO."
                )
        held.compute_log_prob()
        return held


class Objective(ELBO):
    """What the objectives here share: particles, and the three forms of a loss."""

    sums_out = False  # whether the objective can do with a site that the model alone has
    needs_paths = False  # whether it differentiates through draws alone, and takes no score

    def __init__(self, num_particles: int = 1, *, vectorize_particles: bool = True) -> None:
        if not isinstance(num_particles, Integral) or num_particles < 1:
            raise ValueError(f"num_particles is a positive whole number, got {num_particles}.")
        super().__init__(num_particles=int(num_particles), vectorize_particles=vectorize_particles)
        self._layouts: dict[Hashable, Layout] = {}

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Return the loss of a batch in nats."""
        with torch.no_grad():
            return self.differentiable_loss(model, guide, *args, **kwargs).item()

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Return the loss of a batch in nats, and add its gradients to the parameters'."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        return float(warn_if_nan(loss, "loss").item())

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss of a batch in nats, ``()``, whose gradient is the estimator's."""
        raise NotImplementedError

    def _get_trace(self, model: Program, guide: Program, args: Any, kwargs: Any) -> Any:
        model_trace, guide_trace = traces(model, guide, args, kwargs)
        if is_validation_enabled():
            for _, site in (*sample_sites(model_trace), *sample_sites(guide_trace)):
                check_site_shape(site, self.max_plate_nesting)
        _check_latents(model_trace, guide_trace)
        if self.needs_paths and torch.is_grad_enabled():
            _check_paths(type(self).__name__, guide_trace)
        return model_trace, guide_trace

    def _runs(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[int | None, list[_Run]]:
        """Run the pair for all particles: the dimension of those side by side, and the runs."""
        modes = tuple(module.training for module in submodules(model, guide))
        shapes = signature((args, kwargs), floats_by_value=False)
        key = poutine.unwrap(model), poutine.unwrap(guide), modes, shapes
        if key not in self._layouts:
            particles = self.vectorize_particles and self.num_particles > 1
            self._layouts[key] = layout(model, guide, args, kwargs, particles=particles)
        found = self._layouts[key]
        dim = found.particle_dim
        self.max_plate_nesting = found.nesting if dim is None else -dim
        if dim is not None:
            plate = pyro.plate("_particles", self.num_particles, dim=dim)
            model, guide = plate(model), plate(guide)
        if self.sums_out:
            model = found.enumerated(model)
        runs: list[_Run] = []
        while len(runs) < (self.num_particles if dim is None else 1):
            runs.append(_Run(self._get_trace(model, guide, args, kwargs), guide, args, kwargs))
            if len(runs) == 1:  # the others are of the same data, where a plate draws them
                drawn = _plates(*runs[0].traces)
                model, guide = poutine.replay(model, trace=drawn), poutine.replay(guide, trace=drawn)
        return dim, runs

    def _log_weights(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[float, Tensor, Tensor]:
        """Return the scale N / B, log w, (K, N), and the score."""
        dim, runs = self._runs(model, guide, args, kwargs)
        rows = []
        for run in runs:
            ratio, of_p, of_q = _weigh(run)
            rows.append(per_datum(run.model, of_p, dim) - per_datum(run.guide, of_q, dim))
        return ratio, torch.cat(rows), _score(runs, dim)


def _plates(*of: poutine.Trace) -> poutine.Trace:
    """What the plates of some traces draw, without anything else."""
    drawn = poutine.Trace()
    drawn.nodes.update((name, site) for trace in of for name, site in trace.nodes.items() if is_plate(site))
    return drawn


def _check_latents(model_trace: poutine.Trace, guide_trace: poutine.Trace) -> None:
    """Refuse a pair whose latent sites differ."""
    in_model, in_guide = latent_sites(model_trace), latent_sites(guide_trace)
    in_model = {name: site for name, site in in_model.items() if "_enumerate_dim" not in site["infer"]}
    auxiliary = {name for name, site in in_guide.items() if site["infer"].get("is_auxiliary")}
    if in_model.keys() != in_guide.keys() - auxiliary:
        raise ValueError(
            "Model and guide must sample the same latent sites. In the model: "
            f"{sorted(in_model)}; in the guide: {sorted(in_guide.keys() - auxiliary)}. Rename one, or mark "
            "it: infer={'is_auxiliary': True} in the guide, or infer={'enumerate': 'parallel'} in the model, "
            "which IWAE, Renyi, DReG and TraceEnum_ELBO sum out."
        )
    for name, q in in_guide.items():
        p: Site = in_model.get(name, q)
        for what in ("scale", "mask"):
            if not _same(p[what], q[what]):
                raise ValueError(
                    f"Site '{name}' has the {what} {p[what]} in the model and {q[what]} in the guide. "
                    "Expected the same: one plate size, and one handler around both."
                )


def _check_paths(objective: str, guide_trace: poutine.Trace) -> None:
    for name, q in latent_sites(guide_trace).items():
        if not is_identically_zero(q["score_parts"].score_function):
            raise ValueError(
                f"Site '{name}' of the guide, {type(innermost(q['fn'])).__name__}, is not reparameterised: "
                f"{objective} differentiates through the draw alone. Expected a distribution with rsample: "
                "use another family, or MeanField or IWAE, which take the score function, or "
                "TraceEnum_ELBO, which sums the site out."
            )


def _same(p: Any, q: Any) -> bool:
    p, q = (True if each is None else each for each in (p, q))  # no mask
    if isinstance(p, Tensor) or isinstance(q, Tensor):
        # Looked at under validation, as SVI's check of a first batch is; a graph cannot be looked into.
        return not is_validation_enabled() or bool((torch.as_tensor(p) == torch.as_tensor(q)).all())
    return bool(p == q)


def _weigh(run: _Run) -> tuple[float, dict[str, Any], dict[str, Any]]:
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


def _bound(log_w: Tensor, alpha: float = 0.0) -> Tensor:
    """1 / (1 - alpha) log mean w^(1 - alpha), of each datum: (K, N) -> (N,)."""
    if alpha == 1:
        return log_w.mean(0)
    return (((1 - alpha) * log_w).logsumexp(0) - math.log(len(log_w))) / (1 - alpha)


def _gain(log_w: Tensor, alpha: float = 0.0) -> Tensor:
    """What each draw adds to the bound, L - L_-k: (K, N) -> (K, N).

    L_-k is L with the mean of the others for log w_k: 0 without others, or where they are all impossible.
    """
    k = torch.eye(len(log_w), dtype=torch.bool, device=log_w.device).unsqueeze(-1)
    others = torch.where(k, 0, log_w.unsqueeze(1)).sum(0) / (len(log_w) - 1)
    without = _bound(torch.where(k, others, log_w.unsqueeze(1)), alpha)
    return _bound(log_w, alpha) - torch.where(without.isfinite(), without, 0)


def _score(runs: list[_Run], dim: int | None) -> Tensor:
    """Return log q of the draws that no gradient passes through, (K, N), or a constant 0 if there are none.

    It has neither the scale nor the mask of its site: these weigh what a draw costs, not how it is drawn.
    """
    rows = []
    for run in runs:
        scored = poutine.Trace()
        for name, site in latent_sites(run.guide).items():
            score = site["score_parts"].score_function
            if isinstance(score, Tensor) and score.requires_grad:
                scored.nodes[name] = cast(Any, site | {"unscaled_log_prob": score, "mask": None})
        rows.append(per_datum(scored, dict.fromkeys(scored.nodes, 1.0), dim))
    return torch.cat(rows)


def _by_score(gain: Tensor, score: Tensor) -> Tensor:
    """0, with the gradient that no path carries: sum_k gain_k grad log q(z_k), of each datum."""
    return _gradient_of((gain * score).sum(0))


def _surrogate(log_w: Tensor, score: Tensor, alpha: float = 0.0) -> Tensor:
    """Return the bound of each datum, (N,), with all of its gradient."""
    bound = _bound(log_w, alpha)
    return bound + _by_score(_gain(log_w.detach(), alpha), score) if score.requires_grad else bound


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
        ratio, log_w, score = self._log_weights(model, guide, args, kwargs)
        return -ratio * _surrogate(log_w, score).sum()


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
        ratio, log_w, score = self._log_weights(model, guide, args, kwargs)
        return -ratio * _surrogate(log_w, score, self.alpha).sum()


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
        for run in self._runs(model, guide, args, kwargs)[1]:
            held = run.held()
            score = torch.as_tensor(sum(held.nodes[name]["log_prob_sum"] for name in latent_sites(held)))
            elbo = elbo + run.model.log_prob_sum() - run.guide.log_prob_sum() + _gradient_of(score)
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
        dim, runs = self._runs(model, guide, args, kwargs)
        terms = []
        for run in runs:
            ratio, of_p, of_q = _weigh(run)
            latents = {name: of_q[name] for name in latent_sites(run.guide)}
            beta = next(iter(latents.values()), 1.0)
            if not all(_same(beta, other) for other in latents.values()):
                raise ValueError(
                    f"The latent sites have the weights {latents}. Expected one for all: use scale_latents."
                )
            log_p, log_q = per_datum(run.model, of_p, dim), per_datum(run.guide, of_q, dim)
            terms.append((log_p, log_q, per_datum(run.held(), latents, dim)))
        log_p, log_q, score = (torch.cat(rows) for rows in zip(*terms, strict=True))
        log_w = log_p - log_q
        w = log_w.detach().softmax(0)
        path = 1 - beta * (1 - w)  # times w: the weight of what passes through z
        for run, factor in zip(runs, path.split(len(terms[0][0])), strict=True):
            _scale_gradients(run, factor, dim)
        surrogate = w * (log_p - path * (log_q - score))
        return -ratio * (_bound(log_w.detach()).sum() + _gradient_of(surrogate.sum()))


def _scale_gradients(run: _Run, factor: Tensor, dim: int | None) -> None:
    """Multiply what comes back from the model through its latents by a factor, (particles, N)."""
    for name, site in latent_sites(run.model).items():
        if site["value"].requires_grad:
            data_dim = cast(int, data_plate(name, site).dim)
            shape = [1] * -(dim or data_dim)
            shape[data_dim] = factor.shape[1]
            shape[0] *= factor.shape[0]
            scale = factor.reshape(shape + [1] * site["fn"].event_dim)
            site["value"].register_hook(lambda gradient, scale=scale: gradient * scale)


def _gradient_of(value: Tensor) -> Tensor:
    """0, with the gradient of a value."""
    return value - value.detach()


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
        families = (type(innermost(site["fn"])).__name__ for site in (q[name], p[name]))
        return "no closed form is registered for {} and {}".format(*families)
    return kl.expand(q[name]["fn"].batch_shape)


def _kls(run: _Run) -> dict[str, Tensor]:
    """KL(q || p) of each site, of its batch shape: in closed form where that is right, else at the draw."""
    p, q = latent_sites(run.model), latent_sites(run.guide)
    kls = {name: analytic_kl(name, p, q) for name in p}
    return {
        name: kl if isinstance(kl, Tensor) else q[name]["unscaled_log_prob"] - p[name]["unscaled_log_prob"]
        for name, kl in kls.items()
    }


def _elbo_of_draws(runs: list[_Run], kls: list[dict[str, Tensor]], dim: int | None) -> Tensor:
    """What each draw has of the ELBO, scaled, with these KLs in place of log q - log p: (K, N)."""
    rows = []
    for run, of_run in zip(runs, kls, strict=True):
        model = run.model.copy()
        for name, kl in of_run.items():
            model.nodes[name] = cast(Any, model.nodes[name] | {"unscaled_log_prob": -kl})
        of_p = {name: site["scale"] for name, site in sample_sites(model)}
        of_q = {name: site["scale"] for name, site in sample_sites(run.guide) if name not in of_run}
        rows.append((per_datum(model, of_p, dim) - per_datum(run.guide, of_q, dim)).detach())
    return torch.cat(rows)


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
        dim, runs = self._runs(model, guide, args, kwargs)
        kls = [_kls(run) for run in runs]
        elbo: Any = 0.0
        for run, of_run in zip(runs, kls, strict=True):
            elbo = elbo + _without_kl(run)
            for name, kl in of_run.items():
                q = run.guide.nodes[name]
                elbo = elbo - scale_and_mask(kl, scale=q["scale"], mask=q["mask"]).sum()
        elbo = elbo / self.num_particles
        score = _score(runs, dim)
        if score.requires_grad:
            elbo = elbo + _by_score(_gain(_elbo_of_draws(runs, kls, dim), alpha=1), score).sum()
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
        dim, runs = self._runs(model, guide, args, kwargs)
        kls = [_kls(run) for run in runs]
        elbo = sum(_without_kl(run) for run in runs)
        for name, site in latent_sites(runs[0].model).items():
            if isinstance(site["scale"], Tensor) and site["scale"].dim():
                raise ValueError(
                    f"Site '{name}' has a weight for each datum. Expected one for all: use scale_latents."
                )
            over = [d for d in (dim, data_plate(name, site).dim) if d is not None]
            kl = [scale_and_mask(of_run[name], mask=site["mask"]) for of_run in kls]
            there = [scale_and_mask(torch.ones_like(k), mask=site["mask"]) for k in kl]
            total, count = (torch.stack(rows).sum(0).sum(over, keepdim=True) for rows in (kl, there))
            free = self.nats * count
            elbo = elbo - site["scale"] * torch.maximum(total, free).sum()
            for of_run, k in zip(kls, kl, strict=True):  # what each draw adds to the maximum
                of_run[name] = torch.maximum(total, free) - torch.maximum(total - k, free)
        score = _score(runs, dim)
        if score.requires_grad:
            # The other particles are no baseline: through the maximum, what they add depends on this one.
            elbo = elbo + _by_score(_elbo_of_draws(runs, kls, dim), score).sum()
        return -elbo / self.num_particles


def _without_kl(run: _Run) -> Any:
    """Sum all that is no latent of the model: observations and factors, less what the guide has besides."""
    latents = latent_sites(run.model)
    p, q = (
        sum(site["log_prob_sum"] for name, site in sample_sites(trace) if name not in latents)
        for trace in (run.model, run.guide)
    )
    return p - q
