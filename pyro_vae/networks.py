"""Networks: features in, features out, and no probability in between."""

import math
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
        _check_features(f"MLP{self.sizes}", self.sizes[0], features)
        hidden: Tensor = super().forward(features)
        return hidden


def _check_features(network: str, width: int, features: Tensor) -> None:
    if features.shape[-1:] != (width,):
        raise ValueError(
            f"{network} expects features of shape (*batch, {width}), got "
            f"{tuple(features.shape)}. Change its first width or mend what feeds it."
        )
    if not features.is_floating_point():
        raise ValueError(
            f"{network} expects floating-point features, got {features.dtype}. "
            "Convert images with x.float() / 255."
        )


class ConvDown(nn.Module):
    """Images to features: each layer halves the sides by a convolution of stride 2; then one linear layer.

    ``ConvDown((1, 28, 28), 32, 64, num_features=40)`` goes by 32 planes of 14 x 14 and 64 of 7 x 7.
    Images are flat, as everywhere. A convolution knows one batch dimension: the leading ones, particles
    and plates, are made one and put back, so all of them pass through.

    Args:
        shape: (C, H, W) of an image, H and W divisible by 2 for every layer.
        channels: the planes of each layer, at least one.
        num_features: the width of the result.
        activation: makes the module after each convolution.

    Shape:
        ``(*batch, C * H * W) -> (*batch, num_features)``

    Raises:
        ValueError: if the sizes are not positive or a side cannot be halved so often; in ``forward``,
            if the images are not as wide as the shape says, or of another dtype.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        *channels: int,
        num_features: int,
        activation: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        height, width = _small_sides("ConvDown", shape, channels, num_features)
        layers: list[nn.Module] = [nn.Unflatten(1, shape)]
        for planes_in, planes_out in pairwise([shape[0], *channels]):
            layers += [nn.Conv2d(planes_in, planes_out, 4, stride=2, padding=1), activation()]
        layers += [nn.Flatten(), nn.Linear(channels[-1] * height * width, num_features)]
        self.layers = nn.Sequential(*layers)
        self.width = math.prod(shape)

    def forward(self, x: Tensor) -> Tensor:
        """Map flat images to features."""
        _check_features("ConvDown", self.width, x)
        return _with_one_batch_dimension(self.layers, x)


class ConvUp(nn.Module):
    """Features to images: one linear layer; then each layer doubles the sides by a transposed convolution.

    ``ConvUp(20, 64, 32, shape=(1, 28, 28))`` goes by 64 planes of 7 x 7 and 32 of 14 x 14. Leading
    dimensions pass through as in :class:`ConvDown`.

    A family that reads several numbers a pixel takes them as that many images, one after the other:
    shape (2 C, H, W) for :class:`DiscretizedLogistic` over (C, H, W). :class:`Categorical` alone reads
    the K numbers of a pixel together, so exchange the two before it:
    ``features.unflatten(-1, (K, -1)).mT.flatten(-2)``.

    Args:
        num_features: the width of what comes in.
        channels: the planes that each layer starts from, at least one.
        shape: (C, H, W) of the result, H and W divisible by 2 for every layer.
        activation: makes the module before each transposed convolution.

    Shape:
        ``(*batch, num_features) -> (*batch, C * H * W)``

    Raises:
        ValueError: as :class:`ConvDown`.
    """

    def __init__(
        self,
        num_features: int,
        *channels: int,
        shape: tuple[int, int, int],
        activation: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        height, width = _small_sides("ConvUp", shape, channels, num_features)
        small = (*channels[:1], height, width)
        layers: list[nn.Module] = [nn.Linear(num_features, math.prod(small)), nn.Unflatten(1, small)]
        for planes_in, planes_out in pairwise([*channels, shape[0]]):
            layers += [activation(), nn.ConvTranspose2d(planes_in, planes_out, 4, stride=2, padding=1)]
        self.layers = nn.Sequential(*layers, nn.Flatten())
        self.width = num_features

    def forward(self, features: Tensor) -> Tensor:
        """Map features to flat images."""
        _check_features("ConvUp", self.width, features)
        return _with_one_batch_dimension(self.layers, features)


def _small_sides(
    network: str, shape: tuple[int, int, int], channels: tuple[int, ...], num_features: int
) -> tuple[int, int]:
    """Return the sides of the smallest planes, H and W halved once a layer."""
    factor = 2 ** len(channels)
    sizes = [*shape, *channels, num_features]
    whole = len(shape) == 3 and all(isinstance(size, int) and size > 0 for size in sizes)
    if not (channels and whole) or shape[1] % factor or shape[2] % factor:
        raise ValueError(
            f"{network} expects shape=(C, H, W), one or more numbers of planes and a width, all positive, "
            f"with H and W divisible by 2 for every layer, got shape={shape}, {channels} and "
            f"{num_features}. Use fewer layers or pad the images."
        )
    return shape[1] // factor, shape[2] // factor


def _with_one_batch_dimension(layers: nn.Module, x: Tensor) -> Tensor:
    hidden: Tensor = layers(x.reshape(-1, x.shape[-1]))
    return hidden.reshape(*x.shape[:-1], hidden.shape[-1])
