"""Objective: what the ELBOs of this package share, their particles and the forms of a loss.

Each of them is a Pyro ``ELBO``: give it to :class:`~pyro_vae.SVI` or ``pyro.infer.SVI``, compile it with
:class:`~pyro_vae.CompiledELBO`, or call ``elbo(model, guide)`` for a module whose forward is the loss.
If model and guide can take particles side by side, they are drawn in a plate left of all others. This is
tried on the first batch of each shape. Otherwise they are drawn one after the other.
The plate of the data is the one named "data", else the only one around every site.

A gradient passes through a draw of a distribution that has ``rsample``. If it has none (Categorical,
Bernoulli, Poisson), the gradient is that of the score function. STL and DReG need ``rsample``.
"""

from abc import abstractmethod
from typing import Any, ClassVar, NamedTuple, cast

import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.infer.util import is_validation_enabled
from pyro.util import check_site_shape, warn_if_nan
from torch import Tensor

from pyro_vae.arguments import check_flag, whole_number
from pyro_vae.elbos.capabilities import Capabilities
from pyro_vae.programs import Pair, PairCache, Program, Traces
from pyro_vae.programs.plates import PlateLayout, find_layout
from pyro_vae.programs.traces import (
    check_latents,
    check_roles,
    check_rsample,
    is_plate,
    latent_sites,
    map_draw,
    per_data_point,
    sample_sites,
)


class Run(NamedTuple):
    """One run of a pair, with one particle or with several side by side.

    Attributes:
        model: the trace of the model.
        guide: the trace of the guide.
        particle_dim: the batch dimension of the particles, None where they are drawn one after the other.
        pair: the pair, to run again.
        data: the name of the plate of the data, None where the pair's plates do not say.
    """

    model: poutine.Trace
    guide: poutine.Trace
    particle_dim: int | None
    pair: Pair
    data: str | None

    def score(self) -> Tensor:
        """Return log q of the draws that no gradient passes through, (K, N); a constant 0 without any.

        It has neither the scale nor the mask of its site. These weight the cost of a draw, not its
        probability.
        """
        scored = poutine.Trace()
        for name, site in latent_sites(self.guide).items():
            score = site["score_parts"].score_function
            if isinstance(score, Tensor) and score.requires_grad:
                scored.nodes[name] = cast(Any, site | {"unscaled_log_prob": score, "mask": None})
        return per_data_point(scored, dict.fromkeys(scored.nodes, 1.0), self.data, self.particle_dim)

    def guide_at_fixed_draws(self) -> poutine.Trace:
        """Trace the guide with its draws held fixed, so that log q depends on its parameters alone."""
        latents = latent_sites(self.guide)
        fixed = self.guide.copy()
        for name, site in latents.items():
            kept = {key: value for key, value in site.items() if "log_prob" not in key}
            fixed.nodes[name] = cast(Any, kept | {"value": map_draw(Tensor.detach, site["value"])})
        # Sites that depend on a draw have to be computed again from the fixed draw. With one site, there is
        # no such site.
        if len(latents) > 1:
            before = self.pair.snapshot()
            replayed = self.pair.wrapped(guide=poutine.replay(self.pair.guide, trace=fixed))
            with self.pair.on_copied_buffers():
                fixed = replayed.trace_guide()
            if before.random_state_moved():
                raise ValueError(
                    "The guide: expected no noise besides its latent sites, got some (Dropout, say), so that "
                    "a second run with the same latents is another guide. To fix: take it out of the guide, "
                    "or use IWAE or Trace_ELBO."
                )
        try:
            fixed.compute_log_prob()
        except (KeyError, NotImplementedError) as error:  # Pyro's and torch's, of a transform
            raise ValueError(
                "The guide: expected transforms that have an inverse, since STL and DReG take log q at draws "
                f"that are held fixed, got one without: {error}. To fix: use another flow, or MeanField or "
                "IWAE, which need no inverse."
            ) from error
        if is_validation_enabled():
            self._check_same_density(fixed)
        return fixed

    def _check_same_density(self, fixed: poutine.Trace) -> None:
        """Refuse a guide that gives the same draws another density in its second run."""
        for name, site in latent_sites(self.guide).items():
            first, second = site["unscaled_log_prob"], fixed.nodes[name]["unscaled_log_prob"]
            if not torch.allclose(first, second, rtol=1e-2, atol=1e-2, equal_nan=True):
                raise ValueError(
                    f"Site '{name}' of the guide: expected the same log q of the same draw in a second run, "
                    f"since STL and DReG hold draws fixed, got {second.sum().item():.6g} after "
                    f"{first.sum().item():.6g}, as from a flow with Dropout or batch statistics. To fix: use "
                    "eval mode for it, or MeanField or IWAE."
                )


class Objective(ELBO):
    """An ELBO with particles, in three forms: a number, a number with gradients added, a tensor.

    A subclass declares its ``capabilities`` and estimates the loss from runs of the pair.
    """

    capabilities: ClassVar = Capabilities(checks_particles=True)
    copies_draws: ClassVar = (
        False  # whether it tells gradients through the model from those through the guide
    )

    def __init__(self, num_particles: int = 1, *, vectorize_particles: bool = True) -> None:
        num_particles = whole_number("num_particles", num_particles, 1, "draw at least 1")
        check_flag("vectorize_particles", vectorize_particles)
        super().__init__(num_particles=num_particles, vectorize_particles=vectorize_particles)
        self._layouts: PairCache[PlateLayout] = PairCache()

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Return the loss of a batch in nats."""
        with torch.no_grad():
            return self.differentiable_loss(model, guide, *args, **kwargs).item()

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Return the loss of a batch in nats, and add its gradients to those of the parameters."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        return float(warn_if_nan(loss, "loss").item())

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss of a batch in nats, ``()``, whose gradient is the estimator's."""
        bound = self._bound(self._runs(Pair(model, guide, args, kwargs)))
        return -torch.as_tensor(bound)  # a pair without sites has the number 0

    @abstractmethod
    def _bound(self, runs: list[Run]) -> Tensor:
        """Return the bound of a batch in nats, ``()``, with the gradient of the estimator."""

    def _get_trace(self, model: Program, guide: Program, args: Any, kwargs: Any) -> Any:
        return Pair(model, guide, args, kwargs).trace()  # required by Pyro's base class

    def _runs(self, pair: Pair) -> list[Run]:
        """Run the pair for all particles: once where they are side by side, else once for each."""
        key = pair.signature()
        layout = self._layouts.results(pair).get(key)
        if layout is None:
            with pair.trial():
                traces = pair.trace()
            if not traces.are_empty():
                able = self.capabilities
                check_roles(*traces, user=type(self).__name__, observes_guide=able.observes_guide)
            layout = find_layout(pair, particles=self.vectorize_particles and self.num_particles > 1)
            self._layouts.add(pair, key, layout)
        dim = layout.particle_dim
        self.max_plate_nesting = layout.max_plate_nesting if dim is None else -dim
        pair = layout.with_particles(pair, self.num_particles)
        if self.capabilities.sums_out:
            pair = layout.with_enumeration(pair)
        runs: list[Run] = []
        while len(runs) < (self.num_particles if dim is None else 1):
            traces = pair.trace(copy_draws=self.copies_draws)
            self._check(traces, layout)
            runs.append(Run(*traces, dim, pair, layout.data))
            if len(runs) == 1:  # if a plate draws the data, the other runs have the same data
                drawn = _plates(traces)
                pair = pair.wrapped(
                    model=poutine.replay(pair.model, trace=drawn),
                    guide=poutine.replay(pair.guide, trace=drawn),
                )
        return runs

    def _check(self, traces: Traces, layout: PlateLayout) -> None:
        """Refuse traces for which this objective would give a wrong number."""
        name = type(self).__name__
        if is_validation_enabled():
            for trace in traces:
                for _, site in sample_sites(trace):
                    check_site_shape(site, self.max_plate_nesting)
        check_latents(*traces, user=name, sums_out=self.capabilities.sums_out and layout.sums_out)
        if self.capabilities.needs_rsample and torch.is_grad_enabled():
            check_rsample(traces.guide, user=name)


def _plates(traces: Traces) -> poutine.Trace:
    """Return the draws of the plates alone."""
    drawn = poutine.Trace()
    drawn.nodes.update(
        (name, site) for trace in traces for name, site in trace.nodes.items() if is_plate(site)
    )
    return drawn
