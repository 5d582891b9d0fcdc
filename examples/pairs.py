"""The pairs of model and guide, and their data, on which compare_elbos.py compares estimators."""

import argparse
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import pyro_vae as pv
from hierarchical import BottomUp
from hierarchical import Model as TwoLayers

LATENT_DIM, BATCH_SIZE = 20, 128
ModelAndGuide = tuple[nn.Module, nn.Module]


class Data(NamedTuple):
    """Batches to train on, a batch to compare on, and test data."""

    batches: Iterable[Any]
    compared: Tensor
    test: Tensor


def one_layer(likelihood: pv.Family, hidden: int) -> ModelAndGuide:
    """Return the pair 784-hidden-20 with a likelihood."""
    decoder = nn.Sequential(pv.MLP(LATENT_DIM, hidden, likelihood.num_features(784)), likelihood)
    encoder = nn.Sequential(pv.MLP(784, hidden, 2 * LATENT_DIM), pv.DiagNormal())
    return pv.Model(pv.StandardNormal(LATENT_DIM), decoder), pv.Guide(encoder)


def mnist(protocol: Any) -> Callable[[argparse.Namespace], Data]:
    """Return what loads MNIST with a protocol."""

    def load(options: argparse.Namespace) -> Data:
        train, test = pv.data.load(train=True), pv.data.load(train=False)
        x_train, x_test = (pv.data.observe(images, protocol).to(options.device) for images in (train, test))
        batches = pv.data.Batches(train, protocol, BATCH_SIZE, device=options.device)
        return Data(batches, x_train[: options.compared_data], x_test[: options.test_data])

    return load


def simulated(options: argparse.Namespace) -> Data:
    """Return columns of standard normal numbers."""
    x = torch.randn(60_000, 5, dtype=torch.float64).to(options.device)
    return Data(x.split(BATCH_SIZE), x[: options.compared_data], x[-options.test_data :])


# name: model and guide with hidden layers of a width; their data; the protocol of the data
PAIRS: dict[str, tuple[Callable[[int], ModelAndGuide], Callable[[argparse.Namespace], Data], str]] = {
    "bernoulli": (
        lambda hidden: one_layer(pv.Bernoulli(), hidden),
        mnist(pv.data.DynamicBinarisation()),
        "dynamic binarisation",
    ),
    "gaussian": (
        lambda hidden: one_layer(pv.Gaussian(pv.LearnedSigma()), hidden),
        mnist(pv.data.Grey()),
        "grey",
    ),
    "two-layers": (
        lambda hidden: (TwoLayers(hidden), BottomUp(hidden)),
        mnist(pv.data.DynamicBinarisation()),
        "dynamic binarisation",
    ),
    "linear-gaussian": (lambda _: pv.references.linear_gaussian(dim=1), simulated, "simulated columns"),
}


@cache
def exact_loss(k: int) -> Callable[..., Tensor]:
    """Return the loss of the linear-Gaussian pair that the bound of k samples has on average."""

    def loss(model: pv.Model, guide: pv.Guide, x: Tensor) -> Tensor:
        return -pv.references.importance_weighted_bound(model, guide, x, k).sum()

    return loss
