"""Flows: invertible maps with a known change of volume, made of Pyro's transforms."""

from functools import partial

import torch
from pyro.distributions.transforms import AffineCoupling, Permute
from pyro.nn import ConditionalDenseNN
from torch import Tensor, nn
from torch.distributions import Transform

from pyro_vae.arguments import whole_number


class CouplingFlow(nn.Module):
    r"""An invertible map of R^D made of affine couplings: () or context -> a list of Pyro's transforms.

    A coupling leaves one half of the dimensions as it is and scales and shifts the other half:
    :math:`y_1 = x_1,\ y_2 = x_2 \exp(s(x_1, h)) + t(x_1, h)`. Then the halves change places. A step is two
    couplings, so it moves every dimension. Both directions cost one pass, and
    :math:`\log |\det \partial y / \partial x| = \sum s`. The flow starts as the identity.

    Args:
        dim: D, two or more.
        steps: the number of steps.
        hidden: the width of the hidden layer of each network (s, t).
        context: the width of h; 0 for no context.

    Shape:
        context ``(*batch, context)``; the transforms map ``(*batch, D)`` to ``(*batch, D)``.

    Raises:
        ValueError: if dim is below 2, steps or hidden is not positive, or context is negative.

    References:
        Dinh et al. 2017, arXiv 1605.08803.
    """

    reverse: Tensor
    no_context: Tensor

    def __init__(self, dim: int, steps: int = 4, hidden: int = 64, context: int = 0) -> None:
        super().__init__()
        # One half of the dimensions moves the other, so one dimension has no flow.
        dim = whole_number("A flow, dim", dim, 2, "pass the number of dimensions; one dimension has no flow")
        steps = whole_number("A flow, steps", steps, 1, "leave it out for 4")
        hidden = whole_number("A flow, hidden", hidden, 1, "leave it out for 64")
        context = whole_number("A flow, context", context, 0, "0 is without a context")
        # The number of dimensions that stay in each coupling. Those that moved stay in the next one.
        self.stays = [dim // 2, dim - dim // 2] * steps
        self.networks = nn.ModuleList()
        for stays in self.stays:
            network = ConditionalDenseNN(stays, context, [hidden], [dim - stays] * 2)
            for p in network.layers[-1].parameters():
                nn.init.zeros_(p)
            self.networks.append(network)
        self.register_buffer("reverse", torch.arange(dim).flip(0), persistent=False)
        self.register_buffer("no_context", torch.zeros(0), persistent=False)

    def forward(self, context: Tensor | None = None) -> list[Transform]:
        """Return the transforms, in the order in which they are applied."""
        h = self.no_context if context is None else context
        # New transforms at every call. Pyro's transforms cache their last input and output: for the same
        # input tensor they would return the old output after the parameters have changed.
        return [
            transform
            for stays, network in zip(self.stays, self.networks, strict=True)
            for transform in (
                AffineCoupling(stays, partial(_shift_and_log_scale, network, context=h)),
                Permute(self.reverse),
            )
        ]


def _shift_and_log_scale(network: nn.Module, x: Tensor, context: Tensor) -> tuple[Tensor, ...]:
    # Autocast computes them in 16 bits. There the scale, exp(s), would not match s, the log determinant.
    return tuple(part.to(torch.promote_types(part.dtype, torch.float32)) for part in network(x, context))
