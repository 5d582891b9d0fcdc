"""The model p(x, z) and the guide q(z | x): plain Pyro programs to read, run, copy and edit."""

import pyro
from pyro.nn import PyroModule
from torch import Tensor, nn


class Model(PyroModule):
    """The generative model: z ~ p(z);  x ~ p(x | z).

    Args:
        prior: a module () -> p(z).
        decoder: a module z -> p(x | z).

    Shape:
        x ``(B, D)``; sites "z" (latent) and "x" (observed), in the plate "data" of size B.
    """

    def __init__(self, prior: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.prior = prior
        self.decoder = decoder

    def forward(self, x: Tensor) -> Tensor:
        """Sample z, observe x, and return x."""
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior())  # p(z)
            return pyro.sample("x", self.decoder(z), obs=x)  # p(x | z)


class Guide(PyroModule):
    """The inference model: z ~ q(z | x).

    Args:
        encoder: a module x -> q(z | x).

    Shape:
        x ``(B, D)``; site "z", in the plate "data" of size B.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        """Sample z and return it."""
        with pyro.plate("data", len(x)):
            return pyro.sample("z", self.encoder(x))  # q(z | x)
