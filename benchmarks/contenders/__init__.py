"""The work that all contenders do, and the table of contenders.

The work: a variational autoencoder 784-400-20 with ReLU and a Bernoulli likelihood, trained by Adam at
1e-3 on MNIST. All contenders start from the same weights, which are drawn as torch draws those of a linear
layer. Each returns its weights, so that the same code evaluates all of them. The contenders are in the
other modules of this folder. A module is imported only in the processes of contenders that need it.
"""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

WIDTH, HIDDEN = 784, 400
RATE = 1e-3

# Weight (in, out) and bias of encoder 1, encoder 2 (mean, then log sigma), decoder 1 and decoder 2.
Weights = list[NDArray[np.float32]]


class Work(NamedTuple):
    """The work of a contender. Every contender is made from one of these.

    Attributes:
        folder: holds `train.npy`, uint8 of shape (N, 784), and MNIST in torchvision's layout.
        batch: the batch size.
        latent: the dimension of z.
        particles: samples of z per image.
        images: the number of training images.
        seed: the seed of the initial weights and of the noise.
        device: the device of torch's contenders. JAX chooses its own.
    """

    folder: Path
    batch: int = 128
    latent: int = 20
    particles: int = 1
    images: int = 60_000
    seed: int = 0
    device: str = "cpu"

    def pixels(self) -> NDArray[np.uint8]:
        """Read the training images."""
        pixels: NDArray[np.uint8] = np.load(self.folder / "train.npy")[: self.images]
        return pixels

    def observed(self) -> NDArray[np.float32]:
        """Return one batch of binary images, which stays in memory."""
        stored = np.load(self.folder / "train.npy", mmap_mode="r")[: self.batch]
        return (stored >= 128).astype(np.float32)

    def weights(self) -> Weights:
        """Draw the initial weights: uniform within 1 / sqrt(inputs), like those of torch's linear layers."""
        rng = np.random.default_rng(self.seed)
        weights = []
        for rows, columns in self.layers():
            for shape in ((rows, columns), (columns,)):
                weights.append(rng.uniform(-(rows**-0.5), rows**-0.5, shape).astype(np.float32))
        return weights

    def layers(self) -> list[tuple[int, int]]:
        """Return the number of inputs and outputs of the four linear layers."""
        return [(WIDTH, HIDDEN), (HIDDEN, 2 * self.latent), (self.latent, HIDDEN), (HIDDEN, WIDTH)]


class Contender(ABC):
    """One way to train the autoencoder, made from a `Work`."""

    @abstractmethod
    def steps(self, number: int) -> float | None:
        """Take steps on the one batch in memory. Return the last loss in nats per data point.

        A contender that does only a part of a step has no loss and returns None.
        """

    def epoch(self) -> float:
        """Train on all images once, on the contender's own data path. Return the mean loss per data point."""
        raise NotImplementedError(f"{type(self).__name__} has no epochs.")

    def weights(self) -> Weights:
        """Return the weights."""
        raise NotImplementedError(f"{type(self).__name__} has no weights.")


class Entry(NamedTuple):
    """A row of the table.

    Attributes:
        where: the module and the class.
        options: the options of the class.
        protocols: the protocols in which it takes part.
        softplus: whether it uses softplus in place of ReLU.
        grey: whether it trains on grey pixels.
        cuda: whether it needs a GPU.
    """

    where: str
    options: dict[str, Any]
    protocols: str
    softplus: bool = False
    grey: bool = False
    cuda: bool = False

    def load(self) -> Callable[..., Contender]:
        """Import the class."""
        module, name = self.where.split(".")
        contender: Callable[..., Contender] = getattr(importlib.import_module(f"contenders.{module}"), name)
        return contender


EAGER: dict[str, Any] = {"elbo": "TraceMeanField_ELBO"}
COMPILED: dict[str, Any] = {**EAGER, "backend": "inductor"}
REPLAYED: dict[str, Any] = {**EAGER, "backend": "eager"}

CONTENDERS: dict[str, Entry] = {
    "matrix products alone": Entry("in_torch.Products", {}, "steps"),
    "matrix products alone, reduced": Entry("in_torch.Products", {"reduced": True}, "steps"),
    "pyro_vae, batches alone": Entry("in_pyro.Batches", {}, "steps"),
    "PyTorch examples' recipe": Entry("recipes.PyTorchExamples", {}, "training", grey=True),
    "Pyro tutorial's recipe": Entry("in_pyro.Tutorial", {}, "training", softplus=True, grey=True),
    "PyTorch, default Adam": Entry("in_torch.PyTorch", {"fused": None}, "steps training"),
    "PyTorch, fused Adam": Entry("in_torch.PyTorch", {}, "steps training growth"),
    "PyTorch, CUDA graph": Entry("in_torch.Graphed", {}, "steps training", cuda=True),
    "PyTorch, torch.compile": Entry("in_torch.PyTorch", {"compiled": True}, "steps training"),
    "pyro.infer.SVI, Trace": Entry("in_pyro.PyroSVI", {"elbo": "Trace_ELBO"}, "steps training growth"),
    "pyro.infer.SVI, TraceMeanField": Entry("in_pyro.PyroSVI", EAGER, "steps training"),
    "pyro.infer.SVI, JitTrace": Entry("in_pyro.PyroSVI", {"elbo": "JitTrace_ELBO"}, "steps training"),
    "NumPyro": Entry("in_numpyro.NumPyro", {}, "steps training growth"),
    "Flax, optax": Entry("in_flax.Flax", {}, "steps training"),
    "pyro_vae, Trace": Entry("in_pyro.PyroVAE", {"elbo": "Trace_ELBO"}, "steps"),
    "pyro_vae, TraceMeanField": Entry("in_pyro.PyroVAE", EAGER, "steps training growth"),
    "pyro_vae, compiled Trace": Entry("in_pyro.PyroVAE", {**COMPILED, "elbo": "Trace_ELBO"}, "steps"),
    "pyro_vae, replayed TraceMeanField": Entry("in_pyro.PyroVAE", REPLAYED, "steps training"),
    "pyro_vae, replayed TraceMeanField, reduced": Entry(
        "in_pyro.PyroVAE", {**REPLAYED, "reduced": True}, "steps training"
    ),
    "pyro_vae, compiled TraceMeanField": Entry("in_pyro.PyroVAE", COMPILED, "steps training growth"),
    "pyro_vae, compiled TraceMeanField, reduced": Entry(
        "in_pyro.PyroVAE", {**COMPILED, "reduced": True}, "steps training growth"
    ),
}

# The times are divided by those of these contenders: short name -> contender.
YARDSTICKS = {
    "PyTorch": "PyTorch, fused Adam",
    "products": "matrix products alone",
    "Pyro": "pyro.infer.SVI, Trace",
    "NumPyro": "NumPyro",
    "compiled": "pyro_vae, compiled TraceMeanField",
}


def taking_part(protocol: str, only: list[str] | None = None, device: str = "cpu") -> list[str]:
    """Return the names of the contenders of a protocol on a device: all of them, or only the given ones.

    The contenders of "epochs" are those of "training" that keep the images in memory.
    """
    kind = "training" if protocol == "epochs" else protocol
    names = [
        name
        for name, entry in CONTENDERS.items()
        if kind in entry.protocols.split()
        and not (entry.cuda and device == "cpu")
        and not (entry.grey and protocol == "epochs")
    ]
    return names if only is None else [name for name in names if name in only]
