"""Networks: leading dimensions, layers, and wrong input."""

import math

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO
from registry import STRUCTURES, data
from torch import nn

import pyro_vae as pv

SHAPES = {"mnist": (1, 28, 28), "colour": (3, 32, 32)}


def test_mlp_takes_leading_dimensions_and_has_a_linear_end():
    net = pv.MLP(3, 4, 2)
    x = torch.randn(5, 6, 3)
    assert net(x).shape == (5, 6, 2)
    torch.testing.assert_close(net(x)[2], net(x[2]))
    assert [type(layer).__name__ for layer in net] == ["Linear", "ReLU", "Linear"]
    tanh = pv.MLP(3, 4, 2, activation=torch.nn.Tanh)
    assert isinstance(tanh[1], torch.nn.Tanh)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_convolutions_take_leading_dimensions(shape):
    down = pv.ConvDown(shape, 3, 4, num_features=5)
    up = pv.ConvUp(5, 4, 3, shape=shape)
    x = torch.rand(2, 3, math.prod(shape))
    features = down(x)
    assert features.shape == (2, 3, 5)
    assert up(features).shape == x.shape
    torch.testing.assert_close(down(x[1, 2]), features[1, 2])  # no batch at all
    torch.testing.assert_close(up(features[1, 2]), up(features)[1, 2])
    assert up(features[:0]).shape == (0, 3, math.prod(shape))


def test_a_convolution_reads_channels_rows_and_columns():
    """The first layer by hand: channel, row and column of a pixel are in their places."""
    down = pv.ConvDown((3, 4, 8), 2, num_features=1)
    x = torch.rand(96)
    plane = nn.functional.conv2d(
        x.view(1, 3, 4, 8), down.layers[1].weight, down.layers[1].bias, stride=2, padding=1
    )
    torch.testing.assert_close(down.layers[:2](x[None]), plane)


def test_a_colour_vae_on_particles():
    """Two features per pixel, plane by plane, and importance samples side by side."""
    likelihood, shape = pv.DiscretizedLogistic(256), (3, 32, 32)
    decoder = nn.Sequential(pv.ConvUp(4, 4, 3, shape=(6, 32, 32)), likelihood)
    encoder = nn.Sequential(pv.ConvDown(shape, 3, 4, num_features=8), pv.DiagNormal())
    model, guide = pv.Model(pv.StandardNormal(4), decoder), pv.Guide(encoder)
    x = torch.randint(256, (4, 3072)) / 255
    loss = Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1)
    svi = pv.SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), loss=loss)
    assert math.isfinite(svi.step(x))
    assert pv.log_evidence(model, guide, x, 3).values.shape == (4,)
    assert pv.generate(model, x)["x"].sample().shape == x.shape


def test_particles_of_a_convolution_are_drawn_side_by_side():
    make, width = STRUCTURES["convolutional"]
    model, guide = make()
    calls = []
    guide.register_forward_hook(lambda *_: calls.append(1))
    pv.log_evidence(model, guide, data(width=width), 60)
    assert len(calls) < 20


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pv.ConvDown((28, 28), 2, num_features=3), r"channels first, got .28, 28.*\(1, 28, 28\)"),
        (lambda: pv.ConvDown((32, 32, 3), 2, num_features=3), r"put the channels first, \(3, 32, 32\)"),
        (lambda: pv.ConvDown((1, 28, 28), num_features=3), "at least one number of planes"),
        (lambda: pv.ConvDown((1, 28, 28), 2, 2, 2, num_features=3), "divisible by 2 once per layer"),
        (lambda: pv.ConvDown((28, 28), 2, num_features=3), r"shape=\(C, H, W\)"),
        (lambda: pv.ConvDown((1, 4, 4), 2, num_features=3)(torch.rand(2, 9)), r"ConvDown.*\(\*batch, 16\)"),
        (lambda: pv.ConvUp(3, shape=(1, 28, 28)), "one or more numbers of planes"),
        (lambda: pv.ConvUp(0, 2, shape=(1, 28, 28)), "num_features, all positive"),
        (lambda: pv.ConvUp(3, 2, shape=(1, 4, 4))(torch.ones(2, 3).long()), "floating-point"),
    ],
)
def test_invalid_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
