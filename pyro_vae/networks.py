"""Networks: modules from features to features, without any probability."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from pyro_vae.arguments import check_tensor, given, is_whole, require


class MLP(nn.Sequential):
    """A multilayer perceptron whose last layer is linear.

    ``MLP(784, 400, 20)`` is ``Linear(784, 400), ReLU, Linear(400, 20)``. All leading dimensions are batch
    dimensions, so there may be particles and plates to the left of the batch.

    Args:
        sizes: the widths, at least two, starting with that of the input.
        activation: a function () -> the module between two linear layers.

    Shape:
        ``(*batch, sizes[0]) -> (*batch, sizes[-1])``

    Raises:
        ValueError: if there are fewer than two sizes or one is not a positive whole number; in
            ``forward``, if the width of the features is not ``sizes[0]`` or they are not floats.
    """

    def __init__(self, *sizes: int, activation: Callable[[], nn.Module] = nn.ReLU) -> None:
        positive = len(sizes) >= 2 and all(is_whole(size, 1) for size in sizes)
        to_fix = "write MLP(784, 400, 20), for example"
        require(positive, "MLP", "two or more positive widths", given(sizes), to_fix)
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(sizes):
            layers += [nn.Linear(width_in, width_out), _module_of(activation)]
        super().__init__(*layers[:-1])
        self.sizes = sizes

    def forward(self, features: Tensor) -> Tensor:
        """Map features of width ``sizes[0]`` to features of width ``sizes[-1]``."""
        _check_features(f"MLP{self.sizes}", self.sizes[0], features)
        hidden: Tensor = super().forward(features)
        return hidden


def _module_of(activation: Callable[[], nn.Module]) -> nn.Module:
    to_fix = "pass a class of modules, such as nn.SiLU, or a function"
    require(callable(activation), "activation", "a function () -> a module", given(activation), to_fix)
    try:
        made: object = activation()
    except TypeError as error:
        made = error
    require(isinstance(made, nn.Module), "activation", "a function () -> a module", given(made), to_fix)
    return cast(nn.Module, made)


def _check_features(network: str, width: int, features: Tensor) -> None:
    if not isinstance(features, Tensor):
        check_tensor(f"{network}, features", features)
    if features.shape[-1:] != (width,):
        raise ValueError(
            f"{network}: expected features of shape (*batch, {width}), got {tuple(features.shape)}. "
            "To fix: change the first width of the network, or the shape of its input."
        )
    if not features.is_floating_point():
        raise ValueError(
            f"{network}: expected floating-point features, got {features.dtype}. "
            "To fix: convert images with x.float() / 255."
        )


class ConvDown(nn.Module):
    """A convolutional network from images to features.

    Each layer is a convolution of stride 2, which halves the sides. One linear layer follows.
    ``ConvDown((1, 28, 28), 32, 64, num_features=40)`` has layers of 32 planes of 14 x 14 and 64 planes of
    7 x 7. Images are flat, as in the whole package. All leading dimensions are batch dimensions, as in
    :class:`MLP`.

    Args:
        shape: (C, H, W) of an image, H and W divisible by 2 once per layer.
        channels: the number of planes of each layer, at least one layer.
        num_features: the width of the output.
        activation: a function () -> the module after each convolution.

    Shape:
        ``(*batch, C * H * W) -> (*batch, num_features)``

    Raises:
        ValueError: if a size is not positive or a side cannot be halved once per layer; in ``forward``,
            if the width of the images is not C * H * W or they are not floats.
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
            layers += [nn.Conv2d(planes_in, planes_out, 4, stride=2, padding=1), _module_of(activation)]
        layers += [nn.Flatten(), nn.Linear(channels[-1] * height * width, num_features)]
        self.layers = nn.Sequential(*layers)
        self.width = math.prod(shape)

    def forward(self, x: Tensor) -> Tensor:
        """Map flat images to features."""
        _check_features("ConvDown", self.width, x)
        return _merge_batch_dimensions(self.layers, x)


class ConvUp(nn.Module):
    """A convolutional network from features to images.

    It begins with one linear layer. Each further layer is a transposed convolution of stride 2, which doubles
    the sides. ``ConvUp(20, 64, 32, shape=(1, 28, 28))`` starts from 64 planes of 7 x 7, then has 32 planes of
    14 x 14. All leading dimensions are batch dimensions, as in :class:`MLP`.

    A family that reads several numbers per pixel takes them as several images, one after the other: use the
    shape (2 C, H, W) for :class:`DiscretizedLogistic` over (C, H, W). Only :class:`Categorical` reads the K
    numbers of each pixel side by side. Swap the two dimensions before it:
    ``features.unflatten(-1, (K, -1)).mT.flatten(-2)``.

    Args:
        num_features: the width of the input.
        channels: the number of planes at the start of each layer, at least one layer.
        shape: (C, H, W) of the output, H and W divisible by 2 once per layer.
        activation: a function () -> the module before each transposed convolution.

    Shape:
        ``(*batch, num_features) -> (*batch, C * H * W)``

    Raises:
        ValueError: if a size is not positive or a side cannot be halved once per layer; in ``forward``,
            if the width of the features is not ``num_features`` or they are not floats.
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
        small = (int(channels[0]), height, width)
        layers: list[nn.Module] = [nn.Linear(num_features, math.prod(small)), nn.Unflatten(1, small)]
        for planes_in, planes_out in pairwise([*channels, shape[0]]):
            layers += [
                _module_of(activation),
                nn.ConvTranspose2d(planes_in, planes_out, 4, stride=2, padding=1),
            ]
        self.layers = nn.Sequential(*layers, nn.Flatten())
        self.width = num_features

    def forward(self, features: Tensor) -> Tensor:
        """Map features to flat images."""
        _check_features("ConvUp", self.width, features)
        return _merge_batch_dimensions(self.layers, features)


def _small_sides(
    network: str, shape: tuple[int, int, int], channels: tuple[int, ...], num_features: int
) -> tuple[int, int]:
    """Return the sides of the smallest planes: H and W, halved once per layer."""
    factor = 2 ** len(channels)
    three = isinstance(shape, tuple | list | torch.Size) and len(shape) == 3
    whole = three and all(is_whole(size, 1) for size in (*shape, *channels, num_features))
    if not three:
        raise ValueError(
            f"{network}: expected shape=(C, H, W), channels first, got {given(shape)}. To fix: write "
            "(1, 28, 28) for grey images of 28 x 28."
        )
    if not (channels and whole) or shape[1] % factor or shape[2] % factor:
        fix = "use fewer layers, or pad the images"
        if whole and shape[0] > shape[2] < 4:
            fix = f"put the channels first, ({shape[2]}, {shape[0]}, {shape[1]})"
        elif not (channels and whole):
            fix = "give positive whole numbers, and at least one number of planes"
        raise ValueError(
            f"{network}: expected shape=(C, H, W), one or more numbers of planes and num_features, all "
            f"positive, with H and W divisible by 2 once per layer, got shape={given(shape)}, "
            f"{given(channels)} and {given(num_features)}. To fix: {fix}."
        )
    return shape[1] // factor, shape[2] // factor


def _merge_batch_dimensions(layers: nn.Module, x: Tensor) -> Tensor:
    # A convolution takes one batch dimension: merge the leading ones, and split them again.
    hidden: Tensor = layers(x.reshape(-1, x.shape[-1]))
    return hidden.reshape(*x.shape[:-1], hidden.shape[-1])
