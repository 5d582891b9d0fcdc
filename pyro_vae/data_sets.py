"""Data sets of torchvision, and the MNIST that comes with this package: files to bytes."""

import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor
from torchvision import datasets
from torchvision.datasets import EMNIST as EMNIST
from torchvision.datasets.utils import calculate_md5, extract_archive

_EXTRACTING, _SECONDS = ".extracting-", 60  # an extraction takes about one second


class MNIST(datasets.MNIST):
    """The complete MNIST (LeCun et al. 1998), which comes with this package, without a download.

    It is torchvision's class, and ``download=True`` extracts the archives of the package into
    ``<root>/MNIST/raw``, torchvision's layout. Several processes may do this at the same time. Every load
    checks the MD5s of the files that it reads.

    Raises:
        ValueError: if a file is damaged, or ``<root>/MNIST/raw`` is not writable.

    References:
        LeCun, Bottou, Bengio and Haffner 1998, Gradient-based learning applied to document recognition.
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
        """Extract the archives whose files are not in ``raw_folder`` yet."""
        raw = Path(self.raw_folder)
        for left in raw.parent.glob(f"{_EXTRACTING}*"):  # left by an extraction that was killed
            with suppress(OSError):
                if time.time() - left.stat().st_mtime > _SECONDS:
                    shutil.rmtree(left)
        if self._check_exists():
            return
        archives = [(self.archives / name, md5) for name, md5 in self.resources]
        missing = [(file, md5) for file, md5 in archives if not (raw / file.stem).is_file()]
        for file, md5 in missing:
            _check_md5(file, md5, to_fix="reinstall the package pyro-vae")
        try:
            raw.mkdir(parents=True, exist_ok=True)
            # Another process may read or extract at the same time, so a file must appear in raw_folder only
            # when it is complete: write it elsewhere on the same file system, then rename it.
            with tempfile.TemporaryDirectory(prefix=_EXTRACTING, dir=raw.parent) as folder:
                for file, _ in missing:
                    os.replace(extract_archive(file, folder), raw / file.stem)
        except OSError as error:
            raise ValueError(
                f"MNIST: expected a folder to write to, {raw}, got {error!r}. "
                "To fix: make that folder writable, or choose another one with root=..."
            ) from error

    def _load_data(self) -> tuple[Tensor, Tensor]:
        part = "train" if self.train else "t10k"
        for name, md5 in self.extracted.items():
            if name.startswith(part):
                file = Path(self.raw_folder) / name
                _check_md5(file, md5, to_fix="delete it; the next load extracts it again")
        images, labels = super()._load_data()
        return images, labels

    def _check_legacy_exist(self) -> bool:
        return False  # the .pt cache of old torchvision versions would bypass the check of the MD5s


def _check_md5(file: Path, expected: str, to_fix: str) -> None:
    md5 = calculate_md5(file) if file.is_file() else "no file"
    if md5 != expected:
        raise ValueError(
            f"{file}: expected MD5 {expected}, got {md5}. The file is damaged. To fix: {to_fix}."
        )


# The names that data.load takes, with the class and its options.
DATA_SETS: dict[str, tuple[type[datasets.MNIST], dict[str, Any]]] = {
    "mnist": (MNIST, {}),
    "fashion-mnist": (datasets.FashionMNIST, {}),
    "kmnist": (datasets.KMNIST, {}),
    "emnist": (EMNIST, {"split": "balanced"}),
    **{f"emnist-{split}": (EMNIST, {"split": split}) for split in EMNIST.splits},
}
