"""Layouts: which batch dimension of a pair is for what, found out by running it."""

from typing import Any, NamedTuple, cast

import pyro
import torch
from pyro import poutine
from pyro.poutine.enum_messenger import EnumMessenger
from torch.nn.modules.batchnorm import _NormBase

from pyro_vae.programs.pair import Inside, Program, rehearsal
from pyro_vae.programs.traces import latent_sites, sample_sites, traces


class Layout(NamedTuple):
    """What a pair's dimensions are for.

    Attributes:
        nesting: the number of batch dimensions that its plates take.
        particle_dim: the dimension for a plate of particles, None where model or guide cannot take it.
        summed_out: whether the model asks for a site of its own to be enumerated.
    """

    nesting: int
    particle_dim: int | None
    summed_out: bool

    def enumerated(self, model: Program) -> Program:
        """Return the model with those sites enumerated; a dimension is left free for particles."""
        return EnumMessenger(first_available_dim=-2 - self.nesting)(model) if self.summed_out else model


def layout(
    model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any], *, particles: bool
) -> Layout:
    """Find out a pair's layout by a few runs, which leave it as it was.

    What cannot take particles on the left is a network that reads meaning into leading dimensions: a
    convolution fails, and a BatchNorm1d whose channels are as many as the batch is silently wrong. So two
    particles are drawn side by side, and each is weighed once more by itself: only what agrees may go on
    together. All modules are in eval mode meanwhile.
    """
    nets = [(module, module.training) for module in Inside(model, guide).modules]
    with rehearsal(model, guide):
        try:
            for module, _ in nets:
                module.training = False
                if isinstance(module, _NormBase) and module.running_mean is not None:
                    module.running_mean.normal_()  # all the same at the start, which would hide another axis
            both = traces(model, guide, args, kwargs)
            sites = [site for trace in both for _, site in sample_sites(trace)]
            dims = [frame.dim for site in sites for frame in site["cond_indep_stack"] if frame.vectorized]
            nesting = -min(dims, default=0)
            in_model, in_guide = map(latent_sites, both)
            summed_out = any(
                site["infer"].get("enumerate") == "parallel" and not site["infer"].get("num_samples")
                for name, site in in_model.items()
                if name not in in_guide
            )
            found = Layout(nesting, None, summed_out)
            if particles and _takes_particles(model, guide, args, kwargs, found):
                found = found._replace(particle_dim=-1 - nesting)
            return found
        finally:
            for module, training in nets:
                module.training = training


def _takes_particles(
    model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any], found: Layout
) -> bool:
    dim = -1 - found.nesting
    plate = pyro.plate("_particles", 2, dim=dim)
    try:
        together = traces(found.enumerated(plate(model)), plate(guide), args, kwargs)
    except Exception:  # whatever a network says of one dimension more
        return False
    for particle in range(2):
        drawn = together[1].copy()
        for name, site in latent_sites(together[1]).items():
            if site["value"].dim() < site["fn"].event_dim - dim:
                return False
            drawn.nodes[name] = cast(Any, dict(site, value=site["value"][particle]))
        alone = traces(found.enumerated(model), poutine.replay(guide, trace=drawn), args, kwargs)
        for pair in zip(together, alone, strict=True):
            both, one = (dict(sample_sites(trace)) for trace in pair)
            for name in both:
                a, b = both[name]["unscaled_log_prob"], one[name]["unscaled_log_prob"]
                if a.dim() < -dim:
                    return False
                b = b.select(dim, 0) if b.dim() >= -dim else b
                if not torch.allclose(a.select(dim, particle), b, rtol=1e-3, atol=1e-3, equal_nan=True):
                    return False
    return True
