"""Objectives: what the ELBOs of this package share, their particles and the forms of a loss.

Each of them is a Pyro ``ELBO``: give it to :class:`~pyro_vae.SVI` or ``pyro.infer.SVI``, compile it with
:class:`~pyro_vae.CompiledELBO`, or call ``elbo(model, guide)`` for a module whose forward is the loss.
Particles are drawn side by side in a plate left of all others where model and guide take it, which is tried
out on the first batch of each shape, and one after the other where they do not.

A gradient passes through a draw of a distribution that has ``rsample``. Where it has none (Categorical,
Bernoulli, Poisson), the gradient is that of the score function; STL and DReG need ``rsample``.
"""

from collections.abc import Hashable
from numbers import Integral
from typing import Any, NamedTuple, cast

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import is_identically_zero
from pyro.infer import ELBO
from pyro.infer.util import is_validation_enabled
from pyro.util import check_site_shape, warn_if_nan
from torch import Tensor

from pyro_vae.programs.pair import Before, Inside, Program, signature
from pyro_vae.programs.plates import Layout, layout
from pyro_vae.programs.traces import (
    Site,
    family,
    innermost,
    is_plate,
    latent_sites,
    per_datum,
    sample_sites,
    traces,
)


class Run(NamedTuple):
    """One run of model and guide, and the guide itself, to run again.

    Attributes:
        model: the model's trace.
        guide: the guide's.
        particle_dim: the batch dimension of the particles, where they were drawn side by side.
        program: the guide.
        args: the batch.
        kwargs: likewise.
    """

    model: poutine.Trace
    guide: poutine.Trace
    particle_dim: int | None
    program: Program
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def score(self) -> Tensor:
        """Return log q of the draws that no gradient passes through, (K, N); a constant 0 without any.

        It has neither the scale nor the mask of its site: these weigh what a draw costs, not how it is drawn.
        """
        scored = poutine.Trace()
        for name, site in latent_sites(self.guide).items():
            score = site["score_parts"].score_function
            if isinstance(score, Tensor) and score.requires_grad:
                scored.nodes[name] = cast(Any, site | {"unscaled_log_prob": score, "mask": None})
        return per_datum(scored, dict.fromkeys(scored.nodes, 1.0), self.particle_dim)

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
    """An ELBO with particles, in three forms: a number, a number with gradients added, a tensor."""

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
    ) -> list[Run]:
        """Run the pair for all particles: once where they are side by side, else once for each."""
        modes = tuple(module.training for module in Inside(model, guide).modules)
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
        runs: list[Run] = []
        while len(runs) < (self.num_particles if dim is None else 1):
            model_trace, guide_trace = self._get_trace(model, guide, args, kwargs)
            runs.append(Run(model_trace, guide_trace, dim, guide, args, kwargs))
            if len(runs) == 1:  # the others are of the same data, where a plate draws them
                drawn = _plates(model_trace, guide_trace)
                model, guide = poutine.replay(model, trace=drawn), poutine.replay(guide, trace=drawn)
        return runs


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
            if not same(p[what], q[what]):
                raise ValueError(
                    f"Site '{name}' has the {what} {p[what]} in the model and {q[what]} in the guide. "
                    "Expected the same: one plate size, and one handler around both."
                )


def _check_paths(objective: str, guide_trace: poutine.Trace) -> None:
    for name, q in latent_sites(guide_trace).items():
        if not is_identically_zero(q["score_parts"].score_function):
            raise ValueError(
                f"Site '{name}' of the guide, {family(innermost(q['fn']))}, is not reparameterised: "
                f"{objective} differentiates through the draw alone. Expected a distribution with rsample: "
                "use another family, or MeanField or IWAE, which take the score function, or "
                "TraceEnum_ELBO, which sums the site out."
            )


def same(p: Any, q: Any) -> bool:
    """Say whether two scales or two masks are the same."""
    p, q = (True if each is None else each for each in (p, q))  # no mask
    if isinstance(p, Tensor) or isinstance(q, Tensor):
        # Looked at under validation, as SVI's check of a first batch is; a graph cannot be looked into.
        return not is_validation_enabled() or bool((torch.as_tensor(p) == torch.as_tensor(q)).all())
    return bool(p == q)
