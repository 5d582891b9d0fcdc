"""Each likelihood is a familiar loss, with all constants."""

import math

import pytest
import torch
import torch.nn.functional as F
from registry import LIKELIHOODS

import pyro_vae as pv


def test_bernoulli_is_binary_cross_entropy_with_logits():
    logits, x = 3 * torch.randn(8, 6), torch.rand(8, 6).round()
    expected = F.binary_cross_entropy_with_logits(logits, x, reduction="sum")
    torch.testing.assert_close(-pv.Bernoulli()(logits).log_prob(x).sum(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("sigma", [0.1, 1.0])
def test_gaussian_is_the_sum_of_squared_errors(sigma):
    mean, x = torch.randn(8, 6), torch.rand(8, 6)
    n, d = x.shape
    sse = (x - mean).square().sum()
    expected = sse / (2 * sigma**2) + n * d / 2 * math.log(2 * math.pi * sigma**2)
    loss = -pv.Gaussian(sigma)(mean).log_prob(x).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    # and so of the mean squared error, MSE = SSE / (n d):
    mse = F.mse_loss(mean, x)
    torch.testing.assert_close(
        loss,
        n * d * (mse / (2 * sigma**2) + math.log(2 * math.pi * sigma**2) / 2),
        rtol=1e-5,
        atol=0,
    )


def test_gaussian_with_one_learned_sigma_is_half_log_mse_at_its_best():
    mean, x = torch.randn(8, 6), torch.rand(8, 6)
    mse = F.mse_loss(mean, x)
    loss = -pv.Gaussian(pv.LearnedSigma(mse.sqrt().item()))(mean).log_prob(x).sum()
    expected = x.numel() / 2 * (mse.log() + 1 + math.log(2 * math.pi))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


def test_gaussian_with_a_sigma_per_pixel_is_weighted_squared_errors():
    features, x = torch.randn(8, 12), torch.rand(8, 6)
    p = pv.Gaussian(pv.PixelSigma())(features)
    sigma = p.stddev
    expected = ((x - features[:, :6]).square() / (2 * sigma**2)).sum() + (
        (2 * math.pi * sigma**2).log() / 2
    ).sum()
    torch.testing.assert_close(-p.log_prob(x).sum(), expected, rtol=1e-5, atol=0)


def test_categorical_is_cross_entropy():
    logits, level = torch.randn(8, 6, 5), torch.randint(5, (8, 6))
    expected = F.cross_entropy(logits.flatten(0, 1), level.flatten(), reduction="sum")
    p = pv.Categorical(5)(logits.flatten(1))
    torch.testing.assert_close(-p.log_prob(level / 4).sum(), expected, rtol=1e-5, atol=0)
    # -sum p_i log q_i with a one-hot p
    one_hot = F.one_hot(level, 5)
    torch.testing.assert_close(expected, -(one_hot * logits.log_softmax(-1)).sum(), rtol=1e-5, atol=0)


def test_continuous_bernoulli_is_binary_cross_entropy_less_its_normaliser():
    logits, x = torch.randn(8, 6).double(), torch.rand(8, 6).double()
    rate = logits.sigmoid()
    normaliser = 2 * torch.atanh(1 - 2 * rate) / (1 - 2 * rate)
    expected = F.binary_cross_entropy_with_logits(logits, x, reduction="sum") - normaliser.log().sum()
    loss = -pv.ContinuousBernoulli()(logits).log_prob(x).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


def test_logits_of_a_continuous_bernoulli_are_bounded_and_never_dead():
    features = torch.tensor([-1e30, -40.0, -4.0, 0.0, 4.0, 20.0, 1e30], requires_grad=True)
    logits = pv.ContinuousBernoulli()(features).base_dist.logits
    assert (logits.abs() <= 16).all()
    torch.testing.assert_close(logits[2:5], features[2:5], rtol=1e-5, atol=0)
    (grad,) = torch.autograd.grad(logits.sum(), features)
    assert (grad[1:-1] > 1e-5).all()


def test_discretized_logistic_is_a_difference_of_logistic_functions():
    features = torch.rand(4, 12, dtype=torch.float64)
    p = pv.DiscretizedLogistic(256)(features)
    loc, scale = p.base_dist.loc, p.base_dist.log_scale.exp()
    level = torch.randint(1, 255, (4, 6))
    above = torch.sigmoid(((level + 0.5) / 255 - loc) / scale)
    below = torch.sigmoid(((level - 0.5) / 255 - loc) / scale)
    expected = (above - below).log().sum(-1)
    torch.testing.assert_close(p.log_prob(level.double() / 255), expected, rtol=1e-5, atol=0)
    # far in a tail, where that difference of float32 numbers is 0 and its logarithm -inf
    far = pv.DiscretizedLogistic(256)(torch.tensor([-5.0, -4.0]))
    assert far.log_prob(torch.tensor([128 / 255])).isfinite()


@pytest.mark.parametrize("loc", [0.0, 1.0])
def test_the_end_bins_of_a_discretised_logistic_take_the_tails(loc):
    p = pv.DiscretizedLogistic(16)(torch.tensor([loc, 1.0]))
    end = p.log_prob(torch.tensor([loc])).exp()
    above_half_a_bin = torch.sigmoid(0.5 / 15 / p.base_dist.log_scale.exp())
    torch.testing.assert_close(end, above_half_a_bin[0])
    total = p.log_prob(torch.linspace(0, 1, 16).unsqueeze(-1)).exp().sum()
    torch.testing.assert_close(total, torch.tensor(1.0))


@pytest.mark.parametrize("name", ["gaussian-learned", "gaussian-pixel", "discretized-logistic"])
def test_log_sigma_stays_within_its_bounds(name):
    family = LIKELIHOODS[name](3)
    low, high = family.bounds
    for extreme in (-1e4, 1e4):
        if name == "gaussian-learned":
            torch.nn.init.constant_(family.sigma.free, extreme)
        p = family(torch.full((family.num_features(3),), extreme)).base_dist
        log_sigma = p.log_scale if name == "discretized-logistic" else p.scale.log()
        assert ((log_sigma >= low - 1e-5) & (log_sigma <= high + 1e-5)).all()
    assert pv.Gaussian(1.0).bounds is None
