"""Networks: features in, features out, and no probability in between."""

from collections.abc import Callable
from itertools import pairwise

from torch import Tensor, nn


class MLP(nn.Sequential):
    """A multilayer perceptron, linear in its last layer.

    ``MLP(784, 400, 20)`` is ``Linear(784, 400), ReLU, Linear(400, 20)``. Every leading dimension is
    a batch dimension, so particles and plates to the left of the batch pass through.

    Args:
        sizes: the widths, input first: at least two of them.
        activation: makes the module between two linear layers.

    Shape:
        ``(*batch, sizes[0]) -> (*batch, sizes[-1])``

    Raises:
        ValueError: if fewer than two sizes are given or one is not a positive whole number; in
            ``forward``, if the features are not as wide as the network or of another dtype.
    """

    def __init__(self, *sizes: int, activation: Callable[[], nn.Module] = nn.ReLU) -> None:
        if len(sizes) < 2 or not all(isinstance(size, int) and size > 0 for size in sizes):
            raise ValueError(
                f"MLP expects two or more positive widths, as in MLP(784, 400, 20), got {sizes}."
            )
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(sizes):
            layers += [nn.Linear(width_in, width_out), activation()]
        super().__init__(*layers[:-1])
        self.sizes = sizes

    def forward(self, features: Tensor) -> Tensor:
        """Map features of width ``sizes[0]`` to features of width ``sizes[-1]``."""
        if features.shape[-1:] != self.sizes[:1]:
            raise ValueError(
                f"MLP{self.sizes} expects features of shape (*batch, {self.sizes[0]}), got "
                f"{tuple(features.shape)}. Change its first width or mend what feeds it."
            )
        if not features.is_floating_point():
            raise ValueError(
                f"MLP{self.sizes} expects floating-point features, got {features.dtype}. "
                "Convert images with x.float() / 255."
            )
        hidden: Tensor = super().forward(features)
        return hidden
