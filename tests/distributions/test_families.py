import math

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from registry import FAMILIES, LIKELIHOODS, POSTERIORS, PRIORS, data, unsettled

import pyro_vae as pv

each_family = pytest.mark.parametrize("name", FAMILIES)
each_likelihood = pytest.mark.parametrize("name", LIKELIHOODS)


@each_family
@pytest.mark.parametrize("batch", [(), (4,), (3, 4)])
def test_shapes_and_support_of_samples(name, batch):
    family = FAMILIES[name]()
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
    assert p.mean.shape == (*batch, 5)


@each_family
def test_expansion_repeats(name):
    family = FAMILIES[name]()
    p = family(torch.randn(family.num_features(3)))
    x = p.sample((4,))
    expanded = p.expand((4,))
    assert expanded.batch_shape == (4,)
    torch.testing.assert_close(expanded.log_prob(x), p.log_prob(x))


@each_family
def test_mean_is_that_of_the_samples(name):
    family = FAMILIES[name]()
    p = family(torch.rand(family.num_features(4)))  # locations inside [0, 1]
    x = p.sample((50_000,))
    error = x.std(0) / math.sqrt(len(x))
    assert (error > 0).all()
    assert ((x.mean(0) - p.mean).abs() < 5 * error).all()


@each_family
def test_probabilities_sum_to_one(name):
    family = FAMILIES[name]().double()
    p = family(torch.randn(family.num_features(1), dtype=torch.float64))
    levels = {"bernoulli": 2, "categorical": 5, "discretized-logistic": 16}.get(name)
    if levels:
        grid = torch.linspace(0, 1, levels, dtype=torch.float64)
        total = p.log_prob(grid.unsqueeze(-1)).exp().sum()
    else:
        low, high = (0, 1) if name == "continuous-bernoulli" else (-60, 60)
        grid = torch.linspace(low, high, 400_001, dtype=torch.float64)
        total = torch.trapezoid(p.log_prob(grid.unsqueeze(-1)).exp(), grid)
    torch.testing.assert_close(total, torch.ones_like(total), atol=1e-6, rtol=0)


@each_family
@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_gradients_are_finite(name, scale):
    family = FAMILIES[name]()
    features = (scale * torch.randn(200, family.num_features(3)).clamp(-2, 2)).requires_grad_()
    if name in POSTERIORS:
        p = family(features / scale)
        x = p.rsample()
    else:
        p = family(features)
        x = data(name, 200, 3)
    p.log_prob(x).sum().backward()
    assert features.grad.isfinite().all()


@pytest.mark.parametrize("loc", [0.0, 1.0])
def test_the_end_bins_of_a_discretised_logistic_take_the_tails(loc):
    p = pv.DiscretizedLogistic(16)(torch.tensor([loc, 1.0]))
    end = p.log_prob(torch.tensor([loc])).exp()
    above_half_a_bin = torch.sigmoid(0.5 / 15 / p.base_dist.log_scale.exp())
    torch.testing.assert_close(end, above_half_a_bin[0])
    total = p.log_prob(torch.linspace(0, 1, 16).unsqueeze(-1)).exp().sum()
    torch.testing.assert_close(total, torch.tensor(1.0))


OUTSIDE = {
    "bernoulli": [0.5, -1.0, 2.0, math.nan],
    "continuous-bernoulli": [-0.01, 1.01, math.nan],
    "categorical": [0.3, -0.25, 1.25, math.nan],
    "discretized-logistic": [0.5, -1 / 15, 16 / 15, math.nan],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, vs in OUTSIDE.items() for v in vs])
def test_outside_the_support_is_minus_infinity_or_an_error(name, value):
    family = FAMILIES[name]()
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
    family = FAMILIES[name]()
    wrong = [()]
    if family.num_features(3) != 3:
        wrong.append((4, family.num_features(3) + 1))
    for shape in wrong:
        with pytest.raises(ValueError, match="expected features of shape"):
            family(torch.zeros(shape))


# Which familiar loss each likelihood is.


@pytest.mark.parametrize("size", [1, 7, 48, 784])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_joint_bernoulli_is_the_sum_over_pixels(size, scale):
    """Under broadcasting, with its gradients, far from zero, and to float32's rounding of single pixels."""
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
def test_bernoullis_count_whole_numbers_as_pixels(dtype):
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


def test_wrong_pixels_do_not_make_up_for_each_other():
    """x - x^2 is -2 for one pixel 2, and 2 for eight pixels 1/2."""
    x = torch.tensor([2.0, *[0.5] * 8])
    with pyro.validation_enabled(False):
        assert pv.Bernoulli()(torch.zeros(9)).log_prob(x) == -math.inf


def test_joint_bernoulli_of_a_large_image_is_finite():
    """Whose factors, all 1/2 and multiplied with each other at once, would be 2^-4096: zero."""
    log_prob = pv.Bernoulli()(torch.zeros(4096)).log_prob(torch.ones(4096))
    torch.testing.assert_close(log_prob, torch.tensor(-4096 * math.log(2)))


def test_joint_bernoulli_broadcasts_as_a_sum_over_pixels_does():
    for logits, x in ((torch.randn(4, 1), torch.ones(4, 6)), (torch.randn(4, 6), torch.ones(4, 1))):
        p = pv.Bernoulli()(logits)
        torch.testing.assert_close(p.log_prob(x), p.base_dist.log_prob(x).sum(-1))
    images = pv.Bernoulli()(torch.randn(4, 2, 6))
    rows = pv.distributions.densities.IndependentBernoulli(images.base_dist, 2)
    x = torch.ones(4, 2, 6)
    torch.testing.assert_close(rows.log_prob(x), images.log_prob(x).sum(-1))


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
    # the notes' form, -sum p_i log q_i with a one-hot p
    one_hot = F.one_hot(level, 5)
    torch.testing.assert_close(expected, -(one_hot * logits.log_softmax(-1)).sum(), rtol=1e-5, atol=0)


def test_continuous_bernoulli_is_binary_cross_entropy_less_its_normaliser():
    logits, x = torch.randn(8, 6).double(), torch.rand(8, 6).double()
    rate = logits.sigmoid()
    normaliser = 2 * torch.atanh(1 - 2 * rate) / (1 - 2 * rate)
    expected = F.binary_cross_entropy_with_logits(logits, x, reduction="sum") - normaliser.log().sum()
    loss = -pv.ContinuousBernoulli()(logits).log_prob(x).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("logit", [0.0, 1e-4, -0.1, 0.19, 0.21, -3.0, 30.0, -80.0])
def test_continuous_bernoulli_holds_for_every_logit(logit):
    p = pv.distributions.densities.ContinuousBernoulliDistribution(logits=torch.tensor([logit])).to_event(1)
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


def test_logits_of_a_continuous_bernoulli_are_bounded_and_never_dead():
    features = torch.tensor([-1e30, -40.0, -4.0, 0.0, 4.0, 20.0, 1e30], requires_grad=True)
    logits = pv.ContinuousBernoulli()(features).base_dist.logits
    assert (logits.abs() <= 16).all()
    torch.testing.assert_close(logits[2:5], features[2:5], rtol=1e-5, atol=0)
    (grad,) = torch.autograd.grad(logits.sum(), features)
    assert (grad[1:-1] > 1e-5).all()


def _up_to(logit, log_norm, ends):
    for end in ends:
        grid = torch.linspace(0, end.item(), 200_001, dtype=torch.float64)
        yield logit * grid - log_norm, grid


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


@pytest.mark.parametrize("name", ["gaussian-learned", "gaussian-pixel", "discretized-logistic"])
def test_log_sigma_stays_within_its_bounds(name):
    family = LIKELIHOODS[name]()
    low, high = family.bounds
    for extreme in (-1e4, 1e4):
        if name == "gaussian-learned":
            torch.nn.init.constant_(family.sigma.free, extreme)
        p = family(torch.full((family.num_features(3),), extreme)).base_dist
        log_sigma = p.log_scale if name == "discretized-logistic" else p.scale.log()
        assert ((log_sigma >= low - 1e-5) & (log_sigma <= high + 1e-5)).all()
    assert pv.Gaussian(1.0).bounds is None


# Posteriors and their KL, held against the notes' closed forms.


def test_diag_normal_is_mu_plus_sigma_eps():
    mean, log_sigma = torch.randn(4, 3), torch.randn(4, 3)
    q = pv.DiagNormal()(torch.cat([mean, log_sigma], -1))
    torch.manual_seed(1)
    z = q.rsample()
    torch.manual_seed(1)
    eps = torch.randn(4, 3)
    torch.testing.assert_close(z, mean + log_sigma.exp() * eps)


def test_factorised_kl_is_the_notes_formula():
    mean, log_sigma = torch.randn(4, 3), torch.randn(4, 3)
    q = pv.DiagNormal()(torch.cat([mean, log_sigma], -1))
    kl = torch.distributions.kl_divergence(q, pv.StandardNormal(3)())
    variance = (2 * log_sigma).exp()
    expected = 0.5 * (-variance.log().sum(-1) - 3 + variance.sum(-1) + mean.square().sum(-1))
    torch.testing.assert_close(kl, expected)


def test_full_kl_is_the_notes_formula():
    family = pv.FullNormal()
    q = family(torch.randn(4, family.num_features(3), dtype=torch.float64))
    loc, scale = torch.randn(3, dtype=torch.float64), torch.rand(3, dtype=torch.float64) + 0.5
    p = dist.Normal(loc, scale).to_event(1)
    s1, s2 = q.covariance_matrix, torch.diag(scale**2)
    gap = (loc - q.loc).unsqueeze(-1)
    expected = 0.5 * (
        torch.logdet(s2)
        - torch.logdet(s1)
        - 3
        + (torch.linalg.inv(s2) @ s1).diagonal(dim1=-2, dim2=-1).sum(-1)
        + (gap.mT @ torch.linalg.inv(s2) @ gap).flatten()
    )
    torch.testing.assert_close(torch.distributions.kl_divergence(q, p), expected)
    mvn = dist.MultivariateNormal(loc, scale_tril=torch.diag(scale))
    torch.testing.assert_close(torch.distributions.kl_divergence(q, mvn), expected)


def test_full_normal_without_its_lower_entries_is_diag_normal():
    features = torch.randn(4, 6)
    full = pv.FullNormal()(torch.cat([features, torch.zeros(4, 3)], -1))
    diag = pv.DiagNormal()(features)
    z = torch.randn(4, 3)
    torch.testing.assert_close(full.log_prob(z), diag.log_prob(z))


def test_full_normal_reads_its_factor_row_by_row():
    log_sigma = torch.tensor([1.0, 2.0, 3.0]).log()
    q = pv.FullNormal()(torch.cat([torch.tensor([1.0, 2.0, 3.0]), log_sigma, torch.tensor([4.0, 5.0, 6.0])]))
    expected = torch.tensor([[1.0, 0.0, 0.0], [8.0, 2.0, 0.0], [15.0, 18.0, 3.0]])
    torch.testing.assert_close(q.scale_tril, expected)
    torch.testing.assert_close(q.loc, torch.tensor([1.0, 2.0, 3.0]))


@pytest.mark.parametrize("name", PRIORS)
def test_priors(name):
    prior = PRIORS[name]()
    p = prior()
    assert p.batch_shape == ()
    assert len(p.event_shape) == 1
    assert p.log_prob(p.sample((6,))).shape == (6,)
    assert prior.double()().sample().dtype == torch.float64
    assert prior().expand((2,)).sample((7,)).shape == (7, 2, 3)


@pytest.mark.parametrize("name", PRIORS)
def test_the_density_of_a_prior_is_that_of_its_draws(name):
    """Against a wide Gaussian by importance weights: it integrates to one, and so do the first moments."""
    p = unsettled(PRIORS[name]().double())()
    draws = p.sample((40_000,))
    assert draws.shape == (40_000, 3)
    wide = dist.MultivariateNormal(draws.mean(0), 3 * draws.T.cov())
    z = wide.sample((40_000,))
    weights = (p.log_prob(z) - wide.log_prob(z)).exp()
    for function in (lambda z: torch.ones_like(z), lambda z: z, lambda z: z**2, lambda z: z * z.roll(1, -1)):
        ours, theirs = function(draws), weights[:, None] * function(z)
        error = ((ours.var(0) + theirs.var(0)) / len(z)).sqrt()
        assert (error < 0.1 * (1 + ours.mean(0).abs())).all()
        assert ((ours.mean(0) - theirs.mean(0)).abs() < 5 * error).all()


def test_standard_normal_is_standard():
    z = torch.randn(4, 3)
    expected = -0.5 * z.square().sum(-1) - 1.5 * math.log(2 * math.pi)
    torch.testing.assert_close(pv.StandardNormal(3)().log_prob(z), expected)


def test_mlp_takes_leading_dimensions_and_has_a_linear_end():
    net = pv.MLP(3, 4, 2)
    x = torch.randn(5, 6, 3)
    assert net(x).shape == (5, 6, 2)
    torch.testing.assert_close(net(x)[2], net(x[2]))
    assert [type(layer).__name__ for layer in net] == ["Linear", "ReLU", "Linear"]
    tanh = pv.MLP(3, 4, 2, activation=torch.nn.Tanh)
    assert isinstance(tanh[1], torch.nn.Tanh)
