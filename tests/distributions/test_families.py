"""The contract of every registered family."""

import math

import pyro
import pytest
import torch
from registry import FAMILIES, LIKELIHOODS, POSTERIORS, data, levels, support
from torch.distributions import constraints

each_family = pytest.mark.parametrize("name", FAMILIES)


def mean(p):
    """Return the mean of a distribution, or None if it has no closed form."""
    try:
        return p.mean
    except NotImplementedError:
        return None


@each_family
@pytest.mark.parametrize("batch", [(), (4,), (3, 4)])
def test_shapes_and_support_of_samples(name, batch):
    family = FAMILIES[name](5)
    p = family(torch.randn(*batch, family.num_features(5)))
    assert p.batch_shape == batch
    assert p.event_shape == (5,)
    x = p.sample()
    assert x.shape == (*batch, 5)
    assert x.dtype == torch.float32
    assert p.support.check(x).all()
    assert p.log_prob(x).shape == batch
    assert p.log_prob(x).isfinite().all()
    assert p.sample((7,)).shape == (7, *batch, 5)
    assert mean(p) is None or mean(p).shape == (*batch, 5)


@each_family
def test_expansion_repeats(name):
    family = FAMILIES[name](3)
    p = family(torch.randn(family.num_features(3)))
    x = p.sample((4,))
    expanded = p.expand((4,))
    assert expanded.batch_shape == (4,)
    torch.testing.assert_close(expanded.log_prob(x), p.log_prob(x))


@each_family
def test_mean_is_that_of_the_samples(name):
    family = FAMILIES[name](4)
    p = family(torch.rand(family.num_features(4)))  # locations inside [0, 1]
    if mean(p) is None:
        assert name not in LIKELIHOODS  # reconstructions are the mean of p(x | z)
        return
    x = p.sample((50_000,))
    error = x.std(0) / math.sqrt(len(x))
    assert (error > 0).all()
    assert ((x.mean(0) - mean(p)).abs() < 5 * error).all()


@each_family
def test_probabilities_sum_to_one(name):
    """Over the grid of two pixels, or over the plane by quadrature, 12 standard deviations to each side."""
    family = FAMILIES[name](2).double()
    p = family(torch.randn(family.num_features(2), dtype=torch.float64))
    if levels(p):
        line = torch.linspace(0, 1, levels(p), dtype=torch.float64)
        total = p.log_prob(torch.cartesian_prod(line, line)).exp().sum()
    else:
        x = p.sample((2000,))
        low = getattr(support(p), "lower_bound", x.mean(0) - 12 * x.std(0)) + torch.zeros(2)
        high = getattr(support(p), "upper_bound", x.mean(0) + 12 * x.std(0)) + torch.zeros(2)
        lines = [torch.linspace(*ends, 1001, dtype=torch.float64) for ends in zip(low, high, strict=True)]
        density = p.log_prob(torch.cartesian_prod(*lines)).exp().view(1001, 1001)
        total = torch.trapezoid(torch.trapezoid(density, lines[1]), lines[0])
    torch.testing.assert_close(total, torch.ones_like(total), atol=1e-6, rtol=0)


@each_family
@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_gradients_are_finite(name, scale):
    family = FAMILIES[name](3)
    features = (scale * torch.randn(200, family.num_features(3)).clamp(-2, 2)).requires_grad_()
    if name in POSTERIORS:
        p = family(features / scale)
        x = p.rsample()
    else:
        p = family(features)
        x = data(name, 200, 3)
    p.log_prob(x).sum().backward()
    assert features.grad.isfinite().all()


def outside(name):
    """Return values of a pixel that are not in the support of a likelihood; none on the real line."""
    family = LIKELIHOODS[name](1)
    p = family(torch.zeros(family.num_features(1)))
    if support(p) is constraints.real:
        return []
    if levels(p):
        top = levels(p) - 1
        return [1.2 / top, (levels(p) // 2 - 0.5) / top, -1 / top, 1 + 1 / top, math.nan]
    low, high = (getattr(support(p), f"{end}_bound", None) for end in ("lower", "upper"))
    return [*([] if low is None else [low - 0.01]), *([] if high is None else [high + 0.01]), math.nan]


@pytest.mark.parametrize(("name", "value"), [(n, v) for n in LIKELIHOODS for v in outside(n)])
def test_outside_the_support_is_minus_infinity_or_an_error(name, value):
    family = LIKELIHOODS[name](2)
    x = torch.tensor([[0.0, 1.0], [0.0, value]])
    features = torch.randn(2, family.num_features(2))
    with pyro.validation_enabled(False):
        log_prob = family(features).log_prob(x)
    assert log_prob[0].isfinite()
    assert log_prob[1] == -math.inf
    with pytest.raises(ValueError, match="support"):
        family(features).log_prob(x)


@each_family
def test_widths_that_do_not_fit_are_refused(name):
    family = FAMILIES[name](3)
    wrong = [()]
    if family.num_features(3) != 3:
        wrong.append((4, family.num_features(3) + 1))
    for shape in wrong:
        with pytest.raises(ValueError, match="expected features of shape"):
            family(torch.zeros(shape))
