"""Plates: the use of each batch dimension of a pair, found by running it."""

import contextlib
import operator
from typing import Any, NamedTuple, cast

import pyro
import torch
from pyro.poutine.enum_messenger import EnumMessenger

from pyro_vae.programs.pair import Pair
from pyro_vae.programs.traces import data_plate_name, latent_sites, map_draw, sample_sites


class PlateLayout(NamedTuple):
    """The use of the batch dimensions of a pair.

    Attributes:
        max_plate_nesting: the number of batch dimensions that its plates take.
        particle_dim: the dimension for a plate of particles, None if model or guide cannot take it.
        sums_out: whether the model asks for a site that only it has to be enumerated.
        data: the name of the plate of the data, None if the plates do not show it.
    """

    max_plate_nesting: int
    particle_dim: int | None
    sums_out: bool
    data: str | None

    def with_particles(self, pair: Pair, num_particles: int) -> Pair:
        """Return the pair with particles side by side, if it can take them."""
        if self.particle_dim is None:
            return pair
        plate = pyro.plate("_particles", num_particles, dim=self.particle_dim)
        return pair.wrapped(model=plate(pair.model), guide=plate(pair.guide))

    def with_enumeration(self, pair: Pair) -> Pair:
        """Return the pair with the sites of the model enumerated that are to be summed out."""
        if not self.sums_out:
            return pair
        enumerate_sites = EnumMessenger(first_available_dim=-2 - self.max_plate_nesting)  # left of particles
        return pair.wrapped(model=enumerate_sites(pair.model))


def find_layout(pair: Pair, *, particles: bool) -> PlateLayout:
    """Find the layout of a pair by a few runs, which do not change its state.

    A network that gives leading dimensions a meaning cannot take particles there. A convolution fails, and a
    BatchNorm1d with as many channels as data points is silently wrong. So two particles are drawn side by
    side, and each is then weighted alone. They may go side by side only if both ways agree. If one cannot be
    weighted alone, since a flow has no inverse, they may not. All modules are in eval mode during these runs.

    Args:
        pair: the pair on a batch.
        particles: whether to look for a dimension for particles.
    """
    with pair.trial():
        for module in pair.modules:
            module.training = False
            running_mean = getattr(module, "running_mean", None)  # of BatchNorm
            if isinstance(running_mean, torch.Tensor):
                running_mean.normal_()  # at the start all are equal, which would hide a wrong axis
        traces = pair.trace()
        sites = [site for trace in traces for _, site in sample_sites(trace)]
        dims = [frame.dim for site in sites for frame in site["cond_indep_stack"] if frame.vectorized]
        in_model, in_guide = map(latent_sites, traces)
        sums_out = any(
            site["infer"].get("enumerate") == "parallel" and not site["infer"].get("num_samples")
            for name, site in in_model.items()
            if name not in in_guide
        )
        found = PlateLayout(-min(dims, default=0), None, sums_out, data_plate_name(traces))
        with contextlib.suppress(Exception):  # networks fail on one more dimension, flows without an inverse
            if particles and _takes_particles(pair, found):
                found = found._replace(particle_dim=-1 - found.max_plate_nesting)
        return found


def _takes_particles(pair: Pair, found: PlateLayout) -> bool:
    dim = -1 - found.max_plate_nesting
    side_by_side = found._replace(particle_dim=dim).with_particles(pair, 2)
    together = found.with_enumeration(side_by_side).trace()
    for particle in range(2):
        drawn = together.guide.copy()
        for name, site in latent_sites(together.guide).items():
            if site["value"].dim() < site["fn"].event_dim - dim:
                return False
            alone = map_draw(operator.itemgetter(particle), site["value"])
            drawn.nodes[name] = cast(Any, dict(site, value=alone))
        replayed = pair.wrapped(guide=pyro.poutine.replay(pair.guide, trace=drawn))
        by_itself = found.with_enumeration(replayed).trace()
        for both_trace, one_trace in zip(together, by_itself, strict=True):
            both, one = dict(sample_sites(both_trace)), dict(sample_sites(one_trace))
            for name in both:
                a, b = both[name]["unscaled_log_prob"], one[name]["unscaled_log_prob"]
                if a.dim() < -dim:
                    return False
                b = b.select(dim, 0) if b.dim() >= -dim else b
                if not torch.allclose(a.select(dim, particle), b, rtol=1e-3, atol=1e-3, equal_nan=True):
                    return False
    return True
