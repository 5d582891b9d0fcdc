"""Images in memory, and the protocols that turn their pixels into observations x in [0, 1].

``load`` reads a data set as bytes. A protocol defines how a byte becomes a float. ``Batches`` yields the
mini-batches for training, and ``observe`` fixes a test set for evaluation. A log-likelihood depends on the
protocol: print the name of the protocol, ``str(protocol)``, beside every number.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import platformdirs
import torch
from torch import Tensor

from pyro_vae.arguments import as_seed, check_flag, check_tensor, given, is_whole, require, whole_number


class Images(NamedTuple):
    """Labelled grey images in memory.

    Attributes:
        pixels: uint8 of shape ``(N, D)``, each image row by row, D = height * width.
        labels: int64 of shape ``(N,)``.
        name: the name of the data set.
        shape: (height, width) of one image.
        classes: the name of each label.
    """

    pixels: Tensor
    labels: Tensor
    name: str
    shape: tuple[int, ...] = (28, 28)
    classes: tuple[str, ...] = ()


def load(name: str = "mnist", *, train: bool = True, root: str | Path | None = None) -> Images:
    """Load a data set of 28 x 28 grey images.

    - mnist: digits (LeCun et al. 1998). They come with the package.
    - fashion-mnist: articles of clothing (Xiao et al. 2017, arXiv 1708.07747).
    - kmnist: cursive hiragana (Clanuwat et al. 2018, arXiv 1812.01718).
    - emnist: letters and digits (Cohen et al. 2017, arXiv 1702.05373), the balanced split. Each of
      torchvision's splits also has its own name: emnist-balanced, emnist-letters, and so on.

    Args:
        name: one of the names above.
        train: whether to load the training images or the test images.
        root: the folder of the files, in torchvision's layout (``<root>/KMNIST/raw/...``); by default the
            cache folder of the user. torchvision downloads missing files into it.

    Returns:
        The images, upright (EMNIST's files store them transposed), with torchvision's labels (those of
        emnist-letters start at 1).

    Raises:
        ValueError: if the name is unknown, train is not a bool, a file is missing and cannot be downloaded
            (for MNIST, extracted), or a file is damaged.
    """
    from pyro_vae.data_sets import DATA_SETS, EMNIST, MNIST  # torchvision is slow to import

    if not isinstance(name, str) or name not in DATA_SETS:
        known = ", ".join(DATA_SETS)
        raise ValueError(f"name: expected a data set, got {given(name)}. To fix: choose one of {known}.")
    require(isinstance(train, bool), "train", "True or False", given(train), "False is the test set")
    path = root is None or isinstance(root, str | Path)
    require(path, "root", "the path of a folder", given(root), "leave it out for the user's cache")
    data_set, options = DATA_SETS[name]
    root = Path(platformdirs.user_cache_dir("pyro_vae") if root is None else root).expanduser()
    folder = root / data_set.__name__ / "raw"
    try:
        data = data_set(str(root), train=train, download=True, **options)
    except Exception as error:  # torchvision's parser raises errors of many types on a damaged file
        if data_set is MNIST:
            raise  # its message is clear
        raise ValueError(
            f"{name}: expected the files of {data_set.__name__} in {folder}, or a download, got {error!r}. "
            f"To fix: connect to the network, or put the missing files into {folder}; delete damaged files."
        ) from error
    images, labels = data.data, data.targets
    if len(images) != len(labels):
        raise ValueError(
            f"{name} in {folder}: expected one label per image, got {len(images)} images and {len(labels)} "
            "labels. To fix: delete these files; the next load downloads them again."
        )
    if data_set is EMNIST:
        images = images.mT
    return Images(images.flatten(1), labels, name, tuple(images.shape[1:]), tuple(data.classes))


class PixelProtocol(ABC):
    """The rule that turns a pixel in 0..255 into an observation x in [0, 1].

    Your own protocol is a frozen dataclass that implements ``_store``, ``_read`` and ``__str__``.
    """

    def store(self, pixels: Tensor) -> Tensor:
        """Do the part of the protocol that happens once for a data set.

        Args:
            pixels: uint8 of shape ``(N, D)``.

        Returns:
            The bytes to keep in memory, uint8 of shape ``(N, D)``.

        Raises:
            ValueError: if the pixels have another dtype or shape, or there are none.
        """
        return self._store(_checked(pixels))

    def read(self, stored: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Do the part of the protocol that happens at every read.

        Args:
            stored: rows of the result of ``store``, uint8 of shape ``(B, D)``.
            generator: the source of the noise, if the protocol has any; by default torch's global generator.

        Returns:
            x in [0, 1], in torch's default dtype, of shape ``(B, D)``.

        Raises:
            ValueError: if the rows have another dtype or shape, or there are none.
        """
        return self._read(_checked(stored), generator)

    @abstractmethod
    def _store(self, pixels: Tensor) -> Tensor: ...

    @abstractmethod
    def _read(self, stored: Tensor, generator: torch.Generator | None) -> Tensor: ...

    @abstractmethod
    def __str__(self) -> str: ...


def _to_default(pixels: Tensor) -> Tensor:
    return pixels.to(torch.get_default_dtype())


def _checked(pixels: Tensor) -> Tensor:
    check_tensor("pixels", pixels)
    if pixels.dtype != torch.uint8 or pixels.ndim != 2 or not len(pixels):
        images = pixels.dtype == torch.uint8 and pixels.ndim > 2
        to_fix = (
            "make a row of each image with pixels.flatten(1)"
            if images
            else "add images: there is none"
            if not len(pixels)
            else "convert images x in [0, 1] with (x * 255).round().to(torch.uint8).flatten(1)"
        )
        raise ValueError(
            "pixels: expected a uint8 tensor of shape (N, D) with N >= 1 and values in 0..255, got "
            f"{pixels.dtype} of shape {tuple(pixels.shape)}. To fix: {to_fix}."
        )
    return pixels


@dataclass(frozen=True)
class Grey(PixelProtocol):
    """x = pixel / 255. Use it with a density on [0, 1] or on the real line, not with a Bernoulli."""

    def _store(self, pixels: Tensor) -> Tensor:
        return pixels

    def _read(self, stored: Tensor, generator: torch.Generator | None) -> Tensor:
        return _to_default(stored) / 255

    def __str__(self) -> str:
        return "grey pixels"


@dataclass(frozen=True)
class UniformDequantisation(PixelProtocol):
    """x = (pixel + u) / 256, with u uniform on [0, 1) and drawn again at every read.

    A density p of x gives the 256 levels a log mass of at least E_u[log p(x)] - D log 256 nats. So a density
    and a mass on 256 levels can be compared (Theis et al. 2016, arXiv 1511.01844).
    """

    def _store(self, pixels: Tensor) -> Tensor:
        return pixels

    def _read(self, stored: Tensor, generator: torch.Generator | None) -> Tensor:
        x = _to_default(stored)
        device = x.device if generator is None else generator.device
        u = torch.rand(x.shape, generator=generator, dtype=torch.float32, device=device).to(x.device)
        return (x + u) / 256

    def __str__(self) -> str:
        return "uniform dequantisation"


@dataclass(frozen=True)
class GreyLevels(PixelProtocol):
    """x = k / (K - 1), where k = floor(K * pixel / 256) in 0..K-1 is the grey level.

    Args:
        levels: K, a whole number from 2 to 256.

    Raises:
        ValueError: if K is not a whole number from 2 to 256.
    """

    levels: int

    def __post_init__(self) -> None:
        valid = is_whole(self.levels, 2) and self.levels <= 256
        require(valid, "levels", "a whole number from 2 to 256", given(self.levels), "try 8")

    def _store(self, pixels: Tensor) -> Tensor:
        return (pixels.int() * self.levels // 256).to(torch.uint8)

    def _read(self, stored: Tensor, generator: torch.Generator | None) -> Tensor:
        return _to_default(stored) / (self.levels - 1)

    def __str__(self) -> str:
        return f"{self.levels} grey levels"


@dataclass(frozen=True)
class ThresholdBinarisation(PixelProtocol):
    """x = 1 if pixel >= 128, else 0."""

    def _store(self, pixels: Tensor) -> Tensor:
        return (pixels >= 128).to(torch.uint8)

    def _read(self, stored: Tensor, generator: torch.Generator | None) -> Tensor:
        return _to_default(stored)

    def __str__(self) -> str:
        return "threshold binarisation (x = 1 where pixel >= 128)"


@dataclass(frozen=True)
class StaticBinarisation(PixelProtocol):
    """x ~ Bernoulli(pixel / 255), drawn once for the data set (Salakhutdinov and Murray 2008).

    The files of Larochelle and Murray (2011), which many published tables use, hold a different draw.

    Args:
        seed: the seed of the draw. It is the same on every device and keeps the global random state.
    """

    seed: int = 0

    def _store(self, pixels: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(as_seed("seed", self.seed))
        return (_uniform_bytes(pixels, generator) < pixels).to(torch.uint8)

    def _read(self, stored: Tensor, generator: torch.Generator | None) -> Tensor:
        return _to_default(stored)

    def __str__(self) -> str:
        return f"static binarisation (one Bernoulli draw, seed {self.seed})"


@dataclass(frozen=True)
class DynamicBinarisation(PixelProtocol):
    """x ~ Bernoulli(pixel / 255), drawn again at every read (Burda et al. 2015, arXiv 1509.00519)."""

    def _store(self, pixels: Tensor) -> Tensor:
        return pixels

    def _read(self, stored: Tensor, generator: torch.Generator | None) -> Tensor:
        # View the booleans as bytes: torch converts bytes to floats eight times as fast.
        return _to_default((_uniform_bytes(stored, generator) < stored).view(torch.uint8))

    def __str__(self) -> str:
        return "dynamic binarisation"


def _uniform_bytes(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return independent u, uniform on 0..254, of the shape of ``like``: P(u < pixel) = pixel / 255."""
    device = like.device if generator is None else generator.device
    if device.type != "cpu":  # where random bytes are cheap, and a look at their values would wait for them
        return torch.empty_like(like, device=device).random_(0, 255, generator=generator).to(like.device)
    # Random 64-bit words, each viewed as eight bytes, are three times as fast as random bytes on a CPU.
    # A byte must not be 255: the words that contain one (3%) are drawn again, as bytes in 0..254.
    words = torch.empty(-(-like.numel() // 8), dtype=torch.int64, device=device)
    words.random_(-(2**63), None, generator=generator)
    u = words.view(torch.uint8)
    with_255 = (u == torch.full_like(u, 255)).view(torch.int64).nonzero().squeeze(1)
    redrawn = torch.empty(8 * len(with_255), dtype=torch.uint8, device=device)
    words[with_255] = redrawn.random_(0, 255, generator=generator).view(torch.int64)
    return u[: like.numel()].view(like.shape).to(like.device)


class Batches:
    """The mini-batches of an epoch; each ``for x in batches`` is a new epoch.

    Yields x of shape ``(B, D)`` in torch's default dtype; the last batch of an epoch may be smaller. The
    order and the noise of the protocol come from torch's global generator, so ``torch.manual_seed`` makes an
    epoch reproducible.

    Args:
        images: the data, or only their pixels, uint8 of shape ``(N, D)``.
        protocol: the rule that turns pixels into x.
        batch_size: B.
        shuffle: whether every epoch has a new order; otherwise it has the order of the data.
        drop_last: whether an epoch leaves out a last batch that is smaller than the others.
        device: the device that keeps the data and makes the batches; by default the device of the pixels.

    Raises:
        ValueError: if the batch size is not a positive int, shuffle or drop_last is not a bool, or the
            protocol cannot store the pixels; if images or protocol are of another kind.
    """

    def __init__(
        self,
        images: Images | Tensor,
        protocol: PixelProtocol,
        batch_size: int,
        *,
        shuffle: bool = True,
        drop_last: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        _check_protocol(protocol)
        batch_size = whole_number("batch_size", batch_size, 1, "try 128")
        check_flag("shuffle", shuffle)
        check_flag("drop_last", drop_last)
        try:
            device = None if device is None else torch.empty(0, device=device).device
        except (RuntimeError, AssertionError, TypeError) as error:
            raise ValueError(
                f"device: expected a device of this machine, got {given(device)}, and {error}. To fix: "
                "pass 'cpu', for example."
            ) from error
        self.drop_last = drop_last
        self.dataset = protocol.store(_pixels(images)).to(device)
        self.protocol = protocol
        self.batch_size = batch_size
        self.shuffle = shuffle

    def __len__(self) -> int:
        whole, rest = divmod(len(self.dataset), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[Tensor]:
        order = torch.randperm if self.shuffle else torch.arange
        rows = order(len(self.dataset)).to(self.dataset.device)
        for batch in torch.split(rows, self.batch_size)[: len(self)]:
            yield self.protocol.read(self.dataset.index_select(0, batch))


def observe(images: Images | Tensor, protocol: PixelProtocol, seed: int = 0) -> Tensor:
    """Return the whole data set as x: a test set that is the same in every evaluation.

    Args:
        images: the data, or only their pixels, uint8 of shape ``(N, D)``.
        protocol: the rule that turns pixels into x.
        seed: the seed of the noise of the protocol. The global random state does not change.

    Returns:
        x of shape ``(N, D)``, in torch's default dtype.

    Raises:
        ValueError: if the protocol cannot store the pixels.
    """
    _check_protocol(protocol)
    stored = protocol.store(_pixels(images))
    return protocol.read(stored, torch.Generator().manual_seed(as_seed("seed", seed)))


def _pixels(images: Images | Tensor) -> Tensor:
    if not isinstance(images, Images | Tensor):
        raise ValueError(
            f"images: expected Images or a uint8 tensor of shape (N, D), got {type(images).__name__}. To "
            "fix: torch.from_numpy(x) for an array."
        )
    return images.pixels if isinstance(images, Images) else images


def _check_protocol(protocol: PixelProtocol) -> None:
    if not isinstance(protocol, PixelProtocol):
        raise ValueError(
            f"protocol: expected a protocol, got {given(protocol)}. To fix: make one, such as "
            "pyro_vae.data.Grey()."
        )
