"""Flows: invertible maps whose volume change is known, made of Pyro's transforms."""

from functools import partial

import torch
from pyro.distributions.transforms import AffineCoupling, Permute
from pyro.nn import ConditionalDenseNN
from torch import Tensor, nn
from torch.distributions import Transform


class CouplingFlow(nn.Module):
    r"""An invertible map of R^D by affine coupling, () or context -> a list of Pyro's transforms.

    One half of the dimensions stays, and sets the scale and shift of the other:
    :math:`y_1 = x_1,\ y_2 = x_2 \exp(s(x_1, h)) + t(x_1, h)`; then the halves change places. A step
    does so twice, so it moves every dimension. Both directions cost one pass, and
    :math:`\log |\det \partial y / \partial x| = \sum s`. It starts as the identity.

    Args:
        dim: D, two or more.
        steps: how many steps.
        hidden: the width of the hidden layer of each network (s, t).
        context: the width of h, 0 without one.

    Shape:
        context ``(*batch, context)``; the transforms map ``(*batch, D)`` to ``(*batch, D)``.

    Raises:
        ValueError: if dim is below 2, or steps or hidden not positive.

    References:
        Dinh et al. 2017, arXiv 1605.08803.
    """

    reverse: Tensor
    nothing: Tensor

    def __init__(self, dim: int, steps: int = 4, hidden: int = 64, context: int = 0) -> None:
        super().__init__()
        if not (dim >= 2 and steps >= 1 and hidden >= 1 and context >= 0):
            raise ValueError(
                "CouplingFlow expects dim >= 2 (one half moves by the other), steps >= 1, hidden >= 1 and "
                f"context >= 0, got dim={dim}, steps={steps}, hidden={hidden}, context={context}."
            )
        # How many dimensions stay, in turn: those that have moved stay next.
        self.stays = [dim // 2, dim - dim // 2] * steps
        self.networks = nn.ModuleList()
        for stays in self.stays:
            network = ConditionalDenseNN(stays, context, [hidden], [dim - stays] * 2)
            for p in network.layers[-1].parameters():
                nn.init.zeros_(p)
            self.networks.append(network)
        self.register_buffer("reverse", torch.arange(dim).flip(0), persistent=False)
        # Nothing to condition on, in the form of a context.
        self.register_buffer("nothing", torch.zeros(0), persistent=False)

    def forward(self, context: Tensor | None = None) -> list[Transform]:
        """Return the transforms, in the order in which they apply."""
        h = self.nothing if context is None else context
        # New transforms at every call: Pyro's remember their last input by its identity, and would
        # return its old image after the parameters have changed.
        return [
            transform
            for stays, network in zip(self.stays, self.networks, strict=True)
            for transform in (
                AffineCoupling(stays, partial(_shift_and_log_scale, network, h)),
                Permute(self.reverse),
            )
        ]


def _shift_and_log_scale(network: nn.Module, context: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    # Under autocast they come in 16 bits, in which the scale would not be the one whose logarithm counts.
    return tuple(part.to(torch.promote_types(part.dtype, torch.float32)) for part in network(x, context))
