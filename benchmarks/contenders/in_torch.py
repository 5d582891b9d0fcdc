"""Plain PyTorch, and common code of all contenders in torch."""

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contenders import HIDDEN, RATE, WIDTH, Contender, Weights, Work


class InTorch(Contender):
    """Base of the contenders in torch: one step per batch, and images in memory as floats."""

    encoder: nn.Module
    decoder: nn.Module

    def __init__(self, work: Work) -> None:
        self.work = work
        torch.manual_seed(work.seed)
        torch.set_flush_denormal(True)
        self.x = torch.from_numpy(work.observed()).to(work.device)
        self.encoder = mlp(WIDTH, 2 * work.latent, work.weights()[:4]).to(work.device)
        self.decoder = mlp(work.latent, WIDTH, work.weights()[4:]).to(work.device)
        self._images: Tensor | None = None

    @abstractmethod
    def step(self, x: Tensor) -> float:
        """Take a step on a batch. Return the loss in nats, summed over the batch."""

    def batches(self) -> Iterator[Tensor]:
        """Shuffle, gather and binarise in each epoch: the usual code for images in memory."""
        if self._images is None:
            self._images = torch.from_numpy(self.work.pixels()).to(self.work.device).float() / 255
        order = torch.randperm(len(self._images), device=self._images.device)
        for rows in order.split(self.work.batch):
            yield torch.bernoulli(self._images[rows])

    def steps(self, number: int) -> float:
        """Take steps on the batch in memory."""
        for _ in range(number):
            loss = self.step(self.x)
        return loss / len(self.x)

    def epoch(self) -> float:
        """Take a step on each batch."""
        total, count = 0.0, 0
        for x in self.batches():
            total += self.step(x)
            count += len(x)
        return total / count

    def weights(self) -> Weights:
        """Return the weights."""
        return [w for network in (self.encoder, self.decoder) for w in arrays(network)]


def mlp(size_in: int, size_out: int, weights: Weights, activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    """Return a network of two linear layers with the given weights."""
    network = nn.Sequential(nn.Linear(size_in, HIDDEN), activation(), nn.Linear(HIDDEN, size_out))
    with torch.no_grad():
        for p, w in zip(network.parameters(), weights, strict=True):
            p.copy_(torch.from_numpy(w.T))
    return network


def arrays(network: nn.Module) -> Weights:
    """Return a network's weights (in, out) and biases."""
    return [p.detach().cpu().numpy().T.copy() for p in network.parameters()]


class Products(Contender):
    """Only the matrix products of a step, forward and backward."""

    def __init__(self, work: Work, *, reduced: bool = False) -> None:
        kind: dict[str, Any] = {"dtype": torch.bfloat16 if reduced else torch.float32, "device": work.device}
        rows = work.batch
        self.layers = [
            (torch.randn(rows, i, **kind), torch.randn(i, o, **kind), torch.randn(rows, o, **kind))
            for i, o in work.layers()
        ]

    def steps(self, number: int) -> None:
        """Multiply."""
        for _ in range(number):
            for i, (h, w, g) in enumerate(self.layers):
                _ = h @ w
                last = h.T @ g
                if i:  # the gradient of the images is not needed
                    _ = g @ w.T
        float(last[0, 0])  # waits until a GPU has done all of them


class PyTorch(InTorch):
    """The autoencoder written out in PyTorch, with the closed-form KL."""

    def __init__(self, work: Work, *, fused: bool | None = True, compiled: bool = False) -> None:
        super().__init__(work)
        trained = [*self.encoder.parameters(), *self.decoder.parameters()]
        self.optimizer = torch.optim.Adam(trained, lr=RATE, fused=fused)
        self.objective: Any = torch.compile(self.loss) if compiled else self.loss

    def loss(self, x: Tensor) -> Tensor:
        """Return the negative ELBO."""
        mean, log_sigma = self.encoder(x).chunk(2, -1)
        sigma = log_sigma.exp()
        shape = (self.work.particles, *mean.shape) if self.work.particles > 1 else mean.shape
        logits = self.decoder(mean + sigma * torch.randn(shape, device=x.device))
        cross_entropy = F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="sum")
        kl = 0.5 * (sigma**2 + mean**2 - 1 - 2 * log_sigma).sum()
        return cross_entropy / self.work.particles + kl

    def step(self, x: Tensor) -> float:
        """Take a step."""
        self.optimizer.zero_grad()
        loss = self.objective(x)
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())


class Graphed(PyTorch):
    """The same with forward, backward and Adam as one CUDA graph."""

    def __init__(self, work: Work) -> None:
        super().__init__(work, fused=True)
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.optimizer = torch.optim.Adam(trained, lr=RATE, fused=True, capturable=True)
        self.whole = self.x.clone()  # the batch that the graph reads
        initial = [p.detach().clone() for p in trained]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # a capture needs warm kernels and Adam's running means
                self.eager_step(self.whole)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.last = self.eager_step(self.whole)
        with torch.no_grad():
            for p, start in zip(trained, initial, strict=True):
                p.copy_(start)
                for value in self.optimizer.state[p].values():
                    value.zero_()

    def eager_step(self, x: Tensor) -> Tensor:
        """Take a step without a graph. Return the loss, which stays on the device."""
        self.optimizer.zero_grad()
        loss = self.loss(x)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def step(self, x: Tensor) -> float:
        """Take a step: the graph, or a plain step on the smaller last batch of an epoch."""
        if x.shape != self.whole.shape:
            return float(self.eager_step(x))
        self.whole.copy_(x)
        self.graph.replay()
        return float(self.last)
