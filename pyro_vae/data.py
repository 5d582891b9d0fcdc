"""Images in memory, and the protocols by which their pixels become observations x in [0, 1].

`load` reads a data set as bytes, a protocol says how a byte becomes a float, `Batches` goes through
the data for training, and `observe` fixes a test set for evaluation. A log-likelihood has a meaning
only together with its protocol, so the name of the protocol, `str(protocol)`, stands beside every
printed number.
"""

import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import platformdirs
import torch
from torch import Tensor
from torchvision import datasets
from torchvision.datasets.utils import calculate_md5, extract_archive


class MNIST(datasets.MNIST):
    """The complete MNIST, shipped with this package: torchvision's class without its download.

    `download=True` extracts the shipped archives into `<root>/MNIST/raw`, torchvision's layout. Any
    number of processes may do so at once. The MD5s of what is read are checked every time.

    LeCun, Bottou, Bengio, Haffner: Gradient-based learning applied to document recognition, 1998.

    Raises:
        ValueError: A file is damaged, or `<root>/MNIST/raw` cannot be written.
    """

    archives = Path(__file__).parent / "mnist"
    resources = [  # noqa: RUF012 (as torchvision declares it)
        ("train-images-idx3-ubyte.xz", "5f781408c463b99be7b6c0b01c967cfc"),
        ("train-labels-idx1-ubyte.xz", "b0ab8f333f58c4d389a671c9d6800ec3"),
        ("t10k-images-idx3-ubyte.xz", "40e2dac3a89552eaa3069dae6edf0d0c"),
        ("t10k-labels-idx1-ubyte.xz", "8a00c309b70aeaeb839db679c69e5bd7"),
    ]
    extracted: ClassVar[dict[str, str]] = {
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    }

    def download(self) -> None:
        """Extracts the shipped archives, where their files are not in `raw_folder` yet."""
        if self._check_exists():
            return
        raw = Path(self.raw_folder)
        archives = [(self.archives / name, md5) for name, md5 in self.resources]
        missing = [(file, md5) for file, md5 in archives if not (raw / file.stem).is_file()]
        for file, md5 in missing:
            _check_md5(file, md5, "Reinstall the package pyro-vae.")
        try:
            raw.mkdir(parents=True, exist_ok=True)
            # A file appears in raw_folder complete or not at all, whoever else is extracting:
            # it is written elsewhere on the same file system and then renamed.
            with tempfile.TemporaryDirectory(dir=raw.parent) as folder:
                for file, _ in missing:
                    os.replace(extract_archive(file, folder), raw / file.stem)
        except OSError as error:
            raise ValueError(
                f"MNIST cannot be extracted into {raw}: {error}. "
                "Make that folder writable, or name another one with root=..."
            ) from error

    def _load_data(self) -> tuple[Tensor, Tensor]:
        part = "train" if self.train else "t10k"
        for name, md5 in self.extracted.items():
            if name.startswith(part):
                mend = "Delete that file: it is extracted anew at the next load."
                _check_md5(Path(self.raw_folder) / name, md5, mend)
        images, labels = super()._load_data()
        return images, labels

    def _check_legacy_exist(self) -> bool:
        return False  # torchvision's former .pt cache would bypass the check of the MD5s


def _check_md5(file: Path, expected: str, mend: str) -> None:
    found = calculate_md5(file) if file.is_file() else "no file"
    if found != expected:
        raise ValueError(f"{file} is damaged: expected MD5 {expected}, found {found}. {mend}")


_DATA_SETS: dict[str, tuple[type[datasets.MNIST], dict[str, Any]]] = {
    "mnist": (MNIST, {}),
    "fashion-mnist": (datasets.FashionMNIST, {}),
    "kmnist": (datasets.KMNIST, {}),
    "emnist": (datasets.EMNIST, {"split": "balanced"}),
    **{f"emnist-{split}": (datasets.EMNIST, {"split": split}) for split in datasets.EMNIST.splits},
}


class Images(NamedTuple):
    """Labelled grey images in memory.

    Attributes:
        pixels: uint8, shape (N, D): the images row by row, D = height * width.
        labels: int64, shape (N,).
        name: The name of the data set.
        shape: (height, width) of one image.
        classes: The name of each label.
    """

    pixels: Tensor
    labels: Tensor
    name: str
    shape: tuple[int, ...] = (28, 28)
    classes: tuple[str, ...] = ()


def load(name: str = "mnist", *, train: bool = True, root: str | Path | None = None) -> Images:
    """Loads a data set of 28 x 28 grey images.

    - mnist: digits (LeCun et al. 1998). They come with the package.
    - fashion-mnist: articles of clothing (Xiao et al. 2017, arXiv 1708.07747).
    - kmnist: cursive hiragana (Clanuwat et al. 2018, arXiv 1812.01718).
    - emnist: letters and digits (Cohen et al. 2017, arXiv 1702.05373), the balanced split; each of
      torchvision's splits has its own name, emnist-balanced, emnist-letters, and so on.

    Args:
        name: One of the names above.
        train: The images for training, else those for test.
        root: The folder where the files lie in torchvision's layout (`<root>/KMNIST/raw/...`), by
            default the user's cache folder. Missing files are downloaded by torchvision.

    Returns:
        The images upright (EMNIST's files hold them transposed), with torchvision's labels (those
        of emnist-letters start at 1).

    Raises:
        ValueError: There is no such name; or files are missing and can be neither downloaded nor,
            for MNIST, extracted; or files are damaged.
    """
    if name not in _DATA_SETS:
        raise ValueError(f"there is no data set {name!r}; there are {', '.join(_DATA_SETS)}")
    data_set, options = _DATA_SETS[name]
    root = Path(platformdirs.user_cache_dir("pyro_vae") if root is None else root).expanduser()
    folder = root / data_set.__name__ / "raw"
    try:
        data = data_set(str(root), train=train, download=True, **options)
    except Exception as error:  # on a damaged file torchvision's parser raises nearly anything
        if data_set is MNIST:
            raise  # it has said what is wrong
        raise ValueError(
            f"{name} cannot be loaded from {folder}: {error!r}. Files that are missing there are "
            f"downloaded: connect to the network, or put the files of {data_set.__name__} into "
            f"{folder}. Files that are there but damaged: delete them."
        ) from error
    images, labels = data.data, data.targets
    if len(images) != len(labels):
        raise ValueError(
            f"{name} in {folder} has {len(images)} images but {len(labels)} labels, expected one "
            "label an image. Delete these files: they are downloaded anew at the next load."
        )
    if data_set is datasets.EMNIST:
        images = images.mT
    return Images(images.flatten(1), labels, name, tuple(images.shape[1:]), tuple(data.classes))


class PixelProtocol(ABC):
    """How a pixel in 0..255 becomes an observation x in [0, 1].

    A protocol of one's own is a frozen dataclass with a `_store`, a `_read` and a `__str__`.
    """

    def store(self, pixels: Tensor) -> Tensor:
        """What is done once for a data set.

        Args:
            pixels: uint8, shape (N, D).

        Returns:
            What is kept in memory, uint8 of shape (N, D).

        Raises:
            ValueError: The pixels are of another dtype or shape, or there are none.
        """
        return self._store(_checked(pixels))

    def read(self, stored: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """What is done every time that data are looked at.

        Args:
            stored: Rows of what `store` returned: uint8, shape (B, D).
            generator: The source of the noise, if there is any; by default torch's global one.

        Returns:
            x, float32 in [0, 1], of shape (B, D).

        Raises:
            ValueError: The rows are of another dtype or shape, or there are none.
        """
        return self._read(_checked(stored), generator)

    @abstractmethod
    def _store(self, pixels: Tensor) -> Tensor: ...

    @abstractmethod
    def _read(self, stored: Tensor, generator: torch.Generator | None) -> Tensor: ...

    @abstractmethod
    def __str__(self) -> str: ...


def _checked(pixels: Tensor) -> Tensor:
    if pixels.dtype != torch.uint8 or pixels.ndim != 2 or not len(pixels):
        raise ValueError(
            "pixels: expected a uint8 tensor of shape (N, D) with N >= 1 and values in 0..255, got "
            f"{pixels.dtype} of shape {tuple(pixels.shape)}. Images x in [0, 1] become pixels by "
            "(x * 255).round().to(torch.uint8).flatten(1)."
        )
    return pixels


@dataclass(frozen=True)
class Grey(PixelProtocol):
    """x = pixel / 255: for densities on [0, 1], not for a Bernoulli."""

    def _store(self, pixels: Tensor) -> Tensor:
        return pixels

    def _read(self, stored: Tensor, generator: torch.Generator | None) -> Tensor:
        return stored.float() / 255

    def __str__(self) -> str:
        return "grey pixels"


@dataclass(frozen=True)
class GreyLevels(PixelProtocol):
    """x = k / (K - 1) with the grey level k = floor(K * pixel / 256) in 0..K-1.

    Args:
        levels: K, from 2 to 256; anything else is a ValueError.
    """

    levels: int

    def __post_init__(self) -> None:
        if not isinstance(self.levels, int) or not 2 <= self.levels <= 256:
            raise ValueError(f"levels: expected an int from 2 to 256, got {self.levels!r}")

    def _store(self, pixels: Tensor) -> Tensor:
        return (pixels.int() * self.levels // 256).to(torch.uint8)

    def _read(self, stored: Tensor, generator: torch.Generator | None) -> Tensor:
        return stored.float() / (self.levels - 1)

    def __str__(self) -> str:
        return f"{self.levels} grey levels"


@dataclass(frozen=True)
class ThresholdBinarisation(PixelProtocol):
    """x = 1 where pixel >= 128, else 0."""

    def _store(self, pixels: Tensor) -> Tensor:
        return (pixels >= 128).to(torch.uint8)

    def _read(self, stored: Tensor, generator: torch.Generator | None) -> Tensor:
        return stored.float()

    def __str__(self) -> str:
        return "threshold binarisation (x = 1 where pixel >= 128)"


@dataclass(frozen=True)
class StaticBinarisation(PixelProtocol):
    """x ~ Bernoulli(pixel / 255), drawn once and for all (Salakhutdinov and Murray 2008).

    The files of Larochelle and Murray (2011), which published tables use, hold another such draw.

    Args:
        seed: Of the draw. It is the same on every device and leaves the global random state alone.
    """

    seed: int = 0

    def _store(self, pixels: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return (_uniform_bytes(pixels, generator) < pixels).to(torch.uint8)

    def _read(self, stored: Tensor, generator: torch.Generator | None) -> Tensor:
        return stored.float()

    def __str__(self) -> str:
        return f"static binarisation (one Bernoulli draw, seed {self.seed})"


@dataclass(frozen=True)
class DynamicBinarisation(PixelProtocol):
    """x ~ Bernoulli(pixel / 255), drawn anew at every read.

    Burda, Grosse, Salakhutdinov 2015, arXiv 1509.00519.
    """

    def _store(self, pixels: Tensor) -> Tensor:
        return pixels

    def _read(self, stored: Tensor, generator: torch.Generator | None) -> Tensor:
        # Seen as bytes, since torch turns bytes into floats eight times as fast as booleans.
        return (_uniform_bytes(stored, generator) < stored).view(torch.uint8).float()

    def __str__(self) -> str:
        return "dynamic binarisation"


def _uniform_bytes(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Independent u, uniform on 0..254, in the shape of `like`: P(u < pixel) = pixel / 255."""
    # Random 64-bit words, each seen as eight bytes, come three times as fast as random bytes.
    # A byte of 255 is one value too many: the words that hold one (3%) are drawn again in 0..254.
    device = like.device if generator is None else generator.device
    words = torch.empty(-(-like.numel() // 8), dtype=torch.int64, device=device)
    words.random_(-(2**63), None, generator=generator)
    u = words.view(torch.uint8)
    spoilt = (u == torch.full_like(u, 255)).view(torch.int64).nonzero().squeeze(1)
    redrawn = torch.empty(8 * len(spoilt), dtype=torch.uint8, device=device)
    words[spoilt] = redrawn.random_(0, 255, generator=generator).view(torch.int64)
    return u[: like.numel()].view(like.shape).to(like.device)


class Batches:
    """The mini-batches of an epoch; each `for x in batches` is a new epoch.

    Yields x, float32 of shape (B, D); the last batch of an epoch may be smaller than the others.
    The order and the protocol's noise come from torch's global generator: `torch.manual_seed` makes
    an epoch reproducible.

    Args:
        images: The data, or only their pixels, uint8 of shape (N, D).
        protocol: How pixels become x.
        batch_size: B.
        shuffle: A new order every epoch, else the order of the data.
        device: Where the data are kept and the batches are made; by default where the pixels are.

    Raises:
        ValueError: The batch size is not a positive int, or the protocol cannot store the pixels.
    """

    def __init__(
        self,
        images: Images | Tensor,
        protocol: PixelProtocol,
        batch_size: int,
        *,
        shuffle: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size: expected an int of at least 1, got {batch_size!r}")
        self.stored = protocol.store(_pixels(images)).to(device)
        self.protocol = protocol
        self.batch_size = batch_size
        self.shuffle = shuffle

    def __len__(self) -> int:
        return -(-len(self.stored) // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        order = torch.randperm if self.shuffle else torch.arange
        rows = order(len(self.stored)).to(self.stored.device)
        for batch in torch.split(rows, self.batch_size):
            yield self.protocol.read(self.stored.index_select(0, batch))


def observe(images: Images | Tensor, protocol: PixelProtocol, seed: int = 0) -> Tensor:
    """The whole data set as x: a test set which is the same in every evaluation.

    Args:
        images: The data, or only their pixels, uint8 of shape (N, D).
        protocol: How pixels become x.
        seed: Of the protocol's noise. The global random state is not moved.

    Returns:
        x, float32 of shape (N, D).

    Raises:
        ValueError: The protocol cannot store the pixels.
    """
    stored = protocol.store(_pixels(images))
    return protocol.read(stored, torch.Generator().manual_seed(seed))


def _pixels(images: Images | Tensor) -> Tensor:
    return images.pixels if isinstance(images, Images) else images
