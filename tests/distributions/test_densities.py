"""The distributions over pixels: exact values and gradients for every parameter."""

import math

import pyro
import pytest
import torch
import torch.nn.functional as F
from registry import LIKELIHOODS

import pyro_vae as pv
from pyro_vae.distributions.densities import ContinuousBernoulliDistribution, IndependentBernoulli
from pyro_vae.programs.traces import family


@pytest.mark.parametrize("size", [1, 7, 48, 784])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_joint_bernoulli_is_the_sum_over_pixels(size, scale):
    """With broadcasting, gradients, large logits, and up to float32's rounding of single pixels."""
    logits = scale * torch.randn(3, 1, size, dtype=torch.float64)
    x = torch.rand(4, size, dtype=torch.float64).round()

    def value_and_gradient(make, logits, x):
        logits = logits.clone().requires_grad_()
        value = make(logits).log_prob(x)
        weights = torch.arange(1.0, 13.0, dtype=value.dtype).reshape(3, 4)
        return value, torch.autograd.grad((weights * value).sum(), logits)[0]

    class PixelByPixel:
        def __init__(self, logits):
            self.logits = logits

        def log_prob(self, x):
            return (x * F.logsigmoid(self.logits) + (1 - x) * F.logsigmoid(-self.logits)).sum(-1)

    value, gradient = value_and_gradient(pv.Bernoulli(), logits, x)
    expected, expected_gradient = value_and_gradient(PixelByPixel, logits, x)
    torch.testing.assert_close(value, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-13, atol=1e-13)
    in_float32, _ = value_and_gradient(pv.Bernoulli(), logits.float(), x.float())
    torch.testing.assert_close(in_float32.double(), expected, rtol=1e-6, atol=6e-8 * size)


@pytest.mark.filterwarnings("ignore:.torch.jit.script")  # which torch's forward mode uses
def test_joint_bernoulli_differentiates_in_every_way():
    logits, x = torch.randn(6, dtype=torch.float64), torch.rand(6, dtype=torch.float64).round()

    def log_prob(logits, x):
        return pv.Bernoulli()(logits).log_prob(x)

    # log p(x) = x l - softplus(l) is linear in x
    assert torch.autograd.gradcheck(log_prob, (logits.requires_grad_(), x), check_forward_ad=True)
    (slope,) = torch.autograd.grad(log_prob(logits, x.requires_grad_()), x)
    torch.testing.assert_close(slope, logits)
    along = torch.randn_like(x)
    _, change = torch.func.jvp(lambda x: log_prob(logits.detach(), x), (x.detach(),), (along,))
    torch.testing.assert_close(change, along @ logits)
    logits, x, p = logits.detach(), x.detach(), logits.detach().sigmoid()
    torch.testing.assert_close(torch.func.hessian(log_prob)(logits, x), torch.diag(p * (p - 1)))
    several = torch.randn(5, 6, dtype=torch.float64)
    mapped = torch.vmap(log_prob, in_dims=(0, None))(several, x)
    torch.testing.assert_close(mapped, log_prob(several, x))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.int64])
def test_joint_bernoulli_accepts_whole_numbers(dtype):
    logits, x = torch.randn(4, 6), torch.rand(4, 6).round()
    p = pv.Bernoulli()(logits)
    torch.testing.assert_close(p.log_prob(x.to(dtype)), p.log_prob(x))
    each = p.base_dist
    torch.testing.assert_close(each.log_prob(x.to(dtype)), each.log_prob(x))


@pytest.mark.parametrize("pixel", [math.nan, math.inf, -math.inf, 0.5, 255.0])
def test_a_masked_image_with_a_wrong_pixel_has_no_gradient(pixel):
    logits, x = torch.randn(2, 6, requires_grad=True), torch.ones(2, 6)
    x[0, 3] = pixel
    with pyro.validation_enabled(False):
        p = pv.Bernoulli()(logits)
        assert p.log_prob(x)[0] == -math.inf
        (gradient,) = torch.autograd.grad(p.mask(torch.tensor([False, True])).log_prob(x).sum(), logits)
    torch.testing.assert_close(gradient, torch.stack([torch.zeros(6), 1 - logits[1].sigmoid()]))


def test_wrong_pixels_do_not_cancel():
    """x - x^2 is -2 at one pixel 2, and adds up to 2 at eight pixels 1/2."""
    x = torch.tensor([2.0, *[0.5] * 8])
    with pyro.validation_enabled(False):
        assert pv.Bernoulli()(torch.zeros(9)).log_prob(x) == -math.inf


def test_joint_bernoulli_of_a_large_image_is_finite():
    """The product of all its factors, each 1/2, would be 2^-4096, which is zero in float32."""
    log_prob = pv.Bernoulli()(torch.zeros(4096)).log_prob(torch.ones(4096))
    torch.testing.assert_close(log_prob, torch.tensor(-4096 * math.log(2)))


def test_joint_bernoulli_broadcasts_like_a_sum_over_pixels():
    for logits, x in ((torch.randn(4, 1), torch.ones(4, 6)), (torch.randn(4, 6), torch.ones(4, 1))):
        p = pv.Bernoulli()(logits)
        torch.testing.assert_close(p.log_prob(x), p.base_dist.log_prob(x).sum(-1))
    images = pv.Bernoulli()(torch.randn(4, 2, 6))
    rows = IndependentBernoulli(images.base_dist, 2)
    x = torch.ones(4, 2, 6)
    torch.testing.assert_close(rows.log_prob(x), images.log_prob(x).sum(-1))


@pytest.mark.parametrize("logit", [0.0, 1e-4, -0.1, 0.19, 0.21, -3.0, 30.0, -80.0])
def test_continuous_bernoulli_holds_for_every_logit(logit):
    p = ContinuousBernoulliDistribution(logits=torch.tensor([logit])).to_event(1)
    grid = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    log_density = logit * grid
    log_norm = torch.trapezoid(log_density.exp(), grid).log()
    x = torch.tensor([0.3])
    torch.testing.assert_close(p.log_prob(x).double(), logit * 0.3 - log_norm, rtol=1e-5, atol=1e-5)
    mean = torch.trapezoid(grid * (log_density - log_norm).exp(), grid)
    torch.testing.assert_close(p.mean[0].double(), mean, rtol=1e-5, atol=1e-5)
    u = torch.tensor([0.2, 0.9])
    below = p.base_dist.icdf(u).double()
    mass = [torch.trapezoid(d.exp(), g) for d, g in _up_to(logit, log_norm, below)]
    torch.testing.assert_close(torch.stack(mass), u.double(), rtol=1e-3, atol=1e-4)


def _up_to(logit, log_norm, ends):
    for end in ends:
        grid = torch.linspace(0, end.item(), 200_001, dtype=torch.float64)
        yield logit * grid - log_norm, grid


def test_messages_call_a_distribution_by_the_name_of_its_family():
    for make in LIKELIHOODS.values():
        likelihood = make(3)
        p = likelihood(torch.zeros(2, likelihood.num_features(3)))
        name = "Normal" if isinstance(likelihood, pv.Gaussian) else type(likelihood).__name__
        assert family(p) == family(p.expand((4, 2)).mask(False)) == name
