r"""Hamiltonian Monte Carlo over the latents of a pair, for many chains and data at once.

Everything is in terms of u, z = T(u), where T maps the reals to the support of each latent site. Densities of
u contain :math:`|dz / du|`. The chains are the rows of one tensor u, (chains, N, D), for any sites.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import biject_to

from pyro_vae.evaluation.weights import log_densities, log_prob
from pyro_vae.programs import Pair
from pyro_vae.programs.plates import PlateLayout
from pyro_vae.programs.traces import Site, data_plate, latent_sites

LEAPFROGS = 5  # per transition: at equal cost, chains lag behind with 3, and 10 leave too few temperatures


class Point(NamedTuple):
    """The state of the chains: u, the log densities of u by p and q, and their gradients.

    Shape:
        u and the gradients ``(chains, N, D)``, log p and log q ``(chains, N)``.
    """

    u: Tensor
    log_p: Tensor
    log_q: Tensor
    grad_p: Tensor
    grad_q: Tensor

    def log_prob(self, beta: float) -> Tensor:
        """Return log pi(u) = (1 - beta) log q + beta log p, without its constant."""
        return (1 - beta) * self.log_q + beta * self.log_p

    def grad(self, beta: float) -> Tensor:
        """Return the gradient of log pi(u)."""
        return (1 - beta) * self.grad_q + beta * self.grad_p

    def replaced(self, where: Tensor, by: "Point") -> "Point":
        """Return the point with some chains, (chains, N), from another one."""
        pairs = zip(by, self, strict=True)
        return Point(*(torch.where(where if a.dim() == 2 else where[..., None], a, b) for a, b in pairs))


def transition(path: "Path", start: Point, beta: float, step: Tensor, scale: Tensor) -> tuple[Point, Tensor]:
    """Move chains by a step of Hamiltonian Monte Carlo that leaves pi of this temperature invariant.

    Args:
        path: the pair, as densities of u.
        start: the state of the chains.
        beta: the temperature.
        step: the step size for each data point, (N,).
        scale: the scale of each dimension, (N, D). Those of scale 0 do not move.

    Returns:
        The new state, and the probability of each move, (chains, N).
    """
    # Step sizes vary by a fifth. Otherwise a trajectory could be a whole period of a Gaussian, and end where
    # it began (Neal 2011, arXiv 1206.1901).
    jitter = 0.8 + 0.4 * torch.rand_like(start.log_q)
    size = (jitter * step)[..., None] * scale
    first = torch.randn_like(start.u)  # the momentum r ~ N(0, I)
    r, end = first, start
    for _ in range(LEAPFROGS):
        r = r + size / 2 * end.grad(beta)
        end = path.at(end.u + size * r)
        r = r + size / 2 * end.grad(beta)
    # log of pi(u') N(r'; 0, I) / pi(u) N(r; 0, I)
    log_ratio = end.log_prob(beta) - start.log_prob(beta) + (first**2 - r**2).sum(-1) / 2
    rate = log_ratio.clamp(max=0).exp().nan_to_num(0.0)  # rejected if a trajectory is no longer finite
    return start.replaced(torch.rand_like(rate) < rate, by=end), rate


class Path:
    """The pair on one batch as densities of u, for a number of chains.

    Make and use it while the pair is isolated. Without a dimension for particles it takes one chain.

    Args:
        pair: the pair on the batch.
        layout: the layout of the pair.
        chains: the number of chains.
    """

    def __init__(self, pair: Pair, layout: PlateLayout, chains: int) -> None:
        self._layout = layout if chains > 1 else layout._replace(particle_dim=None)
        self._pair = self._layout.with_enumeration(self._layout.with_particles(pair, chains))
        self._sites = latent_sites(self._pair.trace_guide())
        blocks = {name: self._rows(name, u) for name, u in self._unconstrained(self._sites).items()}
        self._shapes = {name: (u.shape, u.dtype) for name, u in blocks.items()}

    def draw(self) -> Tensor:
        """Draw u ~ q, (chains, N, D)."""
        return self._pack(self._unconstrained(latent_sites(self._pair.trace_guide())))

    def inverse(self, latents: Mapping[str, Tensor]) -> Tensor:
        """Return u of given latents, (chains, N, D)."""
        guide = poutine.condition(self._pair.guide, data=dict(latents))
        trace = poutine.trace(guide).get_trace(*self._pair.args, **self._pair.kwargs)
        return self._pack(self._unconstrained({name: trace.nodes[name] for name in latents}))

    def moving(self) -> Tensor:
        """Return 0 for the dimensions of latents that are masked out, else 1: (N, D).

        No density depends on these. They stay where the guide drew them, as in an importance weight.
        """
        masks = {}
        for name, u in self._unconstrained(self._sites).items():
            shape, mask = self._sites[name]["fn"].batch_shape, self._sites[name]["mask"]
            mask = torch.as_tensor(True if mask is None else mask, device=u.device).expand(shape)
            masks[name] = mask.reshape(mask.shape + (1,) * (u.dim() - mask.dim())).expand(u.shape).to(u)
        return self._pack(masks)[0]

    def at(self, u: Tensor) -> Point:
        """Return the densities at u, and their gradients."""
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            setting = _SetLatents(self._unpack(u))
            traces = self._pair.wrapped(guide=setting(self._pair.guide)).trace()
            log_p, log_q = log_densities(traces, self._layout)
            for name, log_det in setting.log_dets.items():
                traces.guide.nodes[name]["unscaled_log_prob"] = log_det
            log_det = log_prob(traces.guide, setting.log_dets, self._layout)  # of dz / du
            densities = [(each + log_det).expand(u.shape[:2]) for each in (log_p, log_q)]
            gradients = [
                torch.autograd.grad(each.sum(), u, retain_graph=True, materialize_grads=True)[0]
                for each in densities
            ]
        return Point(u.detach(), *(each.detach() for each in densities), *gradients)

    # Between the sites and the rows.

    def _unconstrained(self, sites: Mapping[str, Site]) -> dict[str, Tensor]:
        return {name: biject_to(site["fn"].support).inv(site["value"]) for name, site in sites.items()}

    def _pack(self, values: Mapping[str, Tensor]) -> Tensor:
        rows = [self._rows(name, value) for name, value in values.items()]
        return torch.cat([each.reshape(*each.shape[:2], -1) for each in rows], -1)

    def _unpack(self, u: Tensor) -> dict[str, Tensor]:
        sizes = [shape[2:].numel() for shape, _ in self._shapes.values()]
        found = {}
        for (name, (shape, dtype)), part in zip(self._shapes.items(), u.split(sizes, -1), strict=True):
            value = part.reshape(shape).to(dtype).movedim((0, 1), self._dims(name))
            found[name] = value if self._layout.particle_dim else value.squeeze(0)
        return found

    def _rows(self, name: str, value: Tensor) -> Tensor:
        """Return values of a site with its chains and data first: (chains, N, the rest)."""
        if not self._layout.particle_dim:
            value = value.unsqueeze(0)
        return value.movedim(self._dims(name), (0, 1))

    def _dims(self, name: str) -> tuple[int, int]:
        """Return the dimensions of the chains and of the data, in values of a site."""
        site, chains = self._sites[name], self._layout.particle_dim
        batch = len(site["fn"].batch_shape) + (0 if chains else 1)
        data: Any = data_plate(name, site, self._layout.data).dim
        return (batch + chains if chains else 0), batch + data


class _SetLatents(Messenger):
    """Sets z = T(u) at the latents of a guide, and keeps log |dz / du|, of the batch shape of each."""

    def __init__(self, u: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.u = u
        self.log_dets: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        name, fn = msg["name"], msg["fn"]
        if name in self.u:
            # The support may depend on latents before it. Then so does T, and |dz / du| is still the product.
            u, transform = self.u[name], biject_to(fn.support)
            msg["value"], msg["done"] = transform(u), True
            log_det = transform.log_abs_det_jacobian(u, msg["value"])
            self.log_dets[name] = sum_rightmost(log_det, log_det.dim() - len(fn.batch_shape))
