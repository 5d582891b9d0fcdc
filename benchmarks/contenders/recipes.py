"""The recipe of the PyTorch examples, and the code that it shares with the recipe of Pyro's tutorial.

Both are written as in their sources: PIL images through ToTensor and a DataLoader, grey pixels, two heads in
the encoder, a sigmoid in the decoder. Only the widths are those of the other contenders.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torchvision import datasets, transforms

from contenders import RATE, WIDTH, Weights, Work
from contenders.in_torch import InTorch, arrays


class Recipe(InTorch):
    """Base of the recipes: the data set and its loader."""

    activation: type[nn.Module] = nn.ReLU
    scale = 1.0  # log sigma = scale * (output of the second head)

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        torch.set_flush_denormal(False)  # as in their sources
        images: Any = datasets.MNIST(str(work.folder), train=True, transform=transforms.ToTensor())
        if work.images < len(images):
            images = Subset(images, range(work.images))
        self.loader = DataLoader(images, batch_size=work.batch, shuffle=True)
        w = [torch.from_numpy(array.T) for array in work.weights()]
        k = work.latent
        self.body = self.linear(w[0], w[1])
        self.mean, self.spread = self.linear(w[2][:k], w[3][:k]), self.linear(w[2][k:], w[3][k:])
        self.up, self.out = self.linear(w[4], w[5]), self.linear(w[6], w[7])
        self.act = self.activation()
        self.encoder = nn.ModuleList([self.body, self.mean, self.spread])
        self.decoder = nn.Sequential(self.up, self.act, self.out, nn.Sigmoid())

    @staticmethod
    def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
        """Return a linear layer with the given weights."""
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        with torch.no_grad():
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
        return layer

    def batches(self) -> Iterator[Tensor]:
        """Return the grey images of the loader, without their labels."""
        return (x for x, _ in self.loader)

    def weights(self) -> Weights:
        """Return the weights, with the two heads as one layer."""
        body, mean, spread = arrays(self.body), arrays(self.mean), arrays(self.spread)
        heads = [np.concatenate([m, self.scale * s], -1) for m, s in zip(mean, spread, strict=True)]
        return [*body, *heads, *arrays(self.up), *arrays(self.out)]


class PyTorchExamples(Recipe):
    """The VAE of the PyTorch examples: BCE of a sigmoid plus the closed-form KL, default Adam."""

    scale = 0.5  # the output of the head is the log variance

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        trained = [*self.encoder.parameters(), *self.decoder.parameters()]
        self.optimizer = torch.optim.Adam(trained, lr=RATE)

    def step(self, x: Tensor) -> float:
        """Take a step."""
        self.optimizer.zero_grad()
        flat = x.view(-1, WIDTH)
        h = F.relu(self.body(flat))
        mean, log_variance = self.mean(h), self.spread(h)
        std = torch.exp(0.5 * log_variance)
        recon = self.decoder(mean + torch.randn_like(std) * std)
        bce = F.binary_cross_entropy(recon, flat, reduction="sum")
        kld = -0.5 * torch.sum(1 + log_variance - mean.pow(2) - log_variance.exp())
        loss = bce + kld
        loss.backward()
        self.optimizer.step()
        return loss.item()
