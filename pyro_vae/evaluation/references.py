"""References: small models whose evidence, posterior and ELBO are closed forms, for testing an estimator.

There are two models:

- the linear-Gaussian VAE, p(z) = N(0, I), p(x | z) = N(W z + b, s^2 I) and
  q(z | x) = N(A x + c, diag exp(2 l)), where l is linear in x. It is probabilistic PCA with an encoder.
- the mixture of Gaussians, p(y) = Categorical(softmax(a)), p(x | y) = N(m_y, s^2 I), with a discrete latent.
  Its closed forms are sums over the components.

All parameters are in float64. All values are differentiable: an exact gradient is
``torch.autograd.grad(elbo(model, guide, x).sum(), pv.parameters(model, guide))``.

References:
    Tipping and Bishop 1999, Probabilistic Principal Component Analysis; Lucas et al. 2019, arXiv 1911.02469.
"""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import Categorical, MultivariateNormal, Normal

from pyro_vae.arguments import check_tensor, given, is_finite, require, whole_number
from pyro_vae.distributions import DiagNormal, Gaussian, StandardNormal
from pyro_vae.models import Guide, Model


def linear_gaussian(width: int = 5, dim: int = 2, sigma: float = 0.7) -> tuple[Model, Guide]:
    """Return a linear-Gaussian model and guide with random weights, for x of shape (N, width).

    The latent has ``dim`` dimensions. ``sigma`` is s, the standard deviation of x given z.
    """
    width = whole_number("width", width, 1, "pass 5, for example")
    dim = whole_number("dim", dim, 1, "pass 2, for example")
    decoder = nn.Sequential(nn.Linear(dim, width), Gaussian(sigma)).double()
    encoder = nn.Sequential(nn.Linear(width, 2 * dim), DiagNormal()).double()
    return Model(StandardNormal(dim).double(), decoder), Guide(encoder)


def evidence(model: Model, x: Tensor) -> Tensor:
    """Return log p(x) = log N(x; b, W W^T + s^2 I), in nats, of shape (N,)."""
    weight, bias, variance = _decoder(model)
    _check_x(x, weight, len(weight))
    covariance = weight @ weight.T + variance * torch.eye(len(weight)).to(weight)
    return MultivariateNormal(bias, covariance).log_prob(x)


def posterior(model: Model, x: Tensor) -> MultivariateNormal:
    """Return p(z | x) = N(M^-1 W^T (x - b), s^2 M^-1) with M = W^T W + s^2 I.

    Its batch shape is (N,), its event shape (dim,).
    """
    weight, bias, variance = _decoder(model)
    _check_x(x, weight, len(weight))
    inner = weight.T @ weight + variance * torch.eye(weight.shape[1]).to(weight)
    mean = torch.linalg.solve(inner, weight.T @ (x - bias).T).T
    return MultivariateNormal(mean, variance * torch.linalg.inv(inner))


def reconstruction(model: Model, guide: Guide, x: Tensor) -> Tensor:
    """Return E_q[log p(x | z)], in nats, of shape (N,)."""
    weight, bias, variance = _decoder(model)
    _check_x(x, weight, len(weight))
    mean, log_sigma = _encoder(guide)(x).chunk(2, -1)
    error = (x - mean @ weight.T - bias).square().sum(-1)
    spread = ((2 * log_sigma).exp() * weight.square().sum(0)).sum(-1)
    return -(error + spread) / (2 * variance) - x.shape[1] / 2 * torch.log(2 * math.pi * variance)


def kl(guide: Guide, x: Tensor) -> Tensor:
    """Return KL(q(z | x) || p(z)), in nats, of shape (N,)."""
    encoder = _encoder(guide)
    _check_x(x, encoder.weight, encoder.in_features)
    mean, log_sigma = encoder(x).chunk(2, -1)
    return 0.5 * ((2 * log_sigma).exp() + mean.square() - 1 - 2 * log_sigma).sum(-1)


def elbo(model: Model, guide: Guide, x: Tensor) -> Tensor:
    """Return the ELBO, reconstruction - KL, in nats, of shape (N,)."""
    return reconstruction(model, guide, x) - kl(guide, x)


def importance_weighted_bound(model: Model, guide: Guide, x: Tensor, k: int) -> Tensor:
    r"""Return :math:`E \log \frac{1}{k} \sum_i p(x, z_i) / q(z_i | x)`, in nats, of shape (N,).

    It is computed by quadrature, to about 1e-8, for one latent dimension. For any positive S,
    :math:`E \log S = \int_0^\infty (e^{-t} - E e^{-t S}) \, dt / t`. For a mean of k independent weights,
    :math:`E e^{-t S} = (E e^{-t w / k})^k`. These are two integrals over a line, for any k. If the guide is
    more than three times as wide as the posterior, it needs a longer line than this one.
    """
    k = whole_number("k", k, 1, "pass 5, for example")
    weight, bias, variance = _decoder(model)
    _check_x(x, weight, len(weight))
    require(weight.shape[1] == 1, "model", "one latent dimension", weight.shape[1], "pass dim=1")
    mean, log_sigma = _encoder(guide)(x).chunk(2, -1)
    noise = torch.linspace(-9, 9, 241, dtype=x.dtype, device=x.device)
    z = mean + log_sigma.exp() * noise  # (N, 241)
    normal = Normal(torch.zeros(()).to(x), 1.0)
    of_noise = normal.log_prob(noise)
    error = x.unsqueeze(1) - z.unsqueeze(-1) * weight[:, 0] - bias
    log_x = Normal(0.0, variance.sqrt()).log_prob(error).sum(-1)  # log p(x | z)
    log_px = evidence(model, x)
    log_w = log_x + normal.log_prob(z) - (of_noise - log_sigma) - log_px.unsqueeze(1)
    log_t = torch.linspace(-40, 260, 1201, dtype=x.dtype, device=x.device)
    mass = of_noise + math.log(float(noise[1] - noise[0]))
    inside = (
        mass - (log_t.reshape(-1, 1, 1) - math.log(k) + log_w).exp()
    )  # log of E exp(-t w / k), to be summed
    terms = (-log_t.exp()).exp().unsqueeze(1) - (k * inside.logsumexp(-1)).exp()
    return log_px + terms.sum(0) * (log_t[1] - log_t[0])


def set_to_posterior(model: Model, guide: Guide, spread: float = 1.0) -> None:
    """Set the guide to the posterior's mean and to ``spread`` times its marginal standard deviation.

    With a spread of 1 the guide is the exact posterior if the columns of W are orthogonal or if there is one
    latent dimension. In one or two dimensions, a spread above 1 gives the importance weights a finite
    variance. In more, ``spread ** 2`` must exceed half of the largest eigenvalue of the posterior's
    correlation matrix.
    """
    positive = is_finite(spread) and spread > 0
    require(positive, "spread", "a positive number", given(spread), "1 is the posterior's own")
    weight, bias, variance = _decoder(model)
    inner = weight.T @ weight + variance * torch.eye(weight.shape[1]).to(weight)
    gain = torch.linalg.solve(inner, weight.T)
    sigma = float(spread) * (variance * torch.linalg.inv(inner)).diagonal().sqrt()
    encoder = _encoder(guide)
    with torch.no_grad():
        encoder.weight.copy_(torch.cat([gain, torch.zeros_like(gain)]))
        encoder.bias.copy_(torch.cat([-gain @ bias, sigma.log()]))


class Mixture(PyroModule):
    """y ~ Categorical(softmax(a));  x ~ N(m_y, s^2 I): a model with a discrete latent that is summed out.

    Args:
        components: the number of values of y.
        width: the number of columns of x.
        sigma: s, the standard deviation of x given y.

    Shape:
        x ``(N, width)``. The sites "y" and "x" are in the plate "data"; "y" is marked for parallel
        enumeration.
    """

    def __init__(self, components: int = 3, width: int = 2, sigma: float = 0.7) -> None:
        super().__init__()
        components = whole_number("components", components, 1, "pass 3, for example")
        width = whole_number("width", width, 1, "pass 2, for example")
        positive = is_finite(sigma) and sigma > 0
        require(positive, "sigma", "a positive number", given(sigma), "pass 0.7, for example")
        self.logits = nn.Parameter(torch.randn(components, dtype=torch.float64))
        self.means = nn.Parameter(torch.randn(components, width, dtype=torch.float64))
        self.sigma = sigma

    def forward(self, x: Tensor) -> Tensor:
        """Sample y and observe x."""
        with pyro.plate("data", len(x)):
            p_y = dist.Categorical(logits=self.logits)
            y = pyro.sample("y", p_y, infer={"enumerate": "parallel"})  # p(y)
            return pyro.sample("x", dist.Normal(self.means[y], self.sigma).to_event(1), obs=x)  # p(x | y)

    def log_joint(self, x: Tensor) -> Tensor:
        """Return log p(x, y) for each y, in nats, of shape (N, components)."""
        log_prob: Tensor = Categorical(logits=self.logits).logits + (
            dist.Normal(self.means, self.sigma).to_event(1).log_prob(x.unsqueeze(1))
        )
        return log_prob

    def evidence(self, x: Tensor) -> Tensor:
        """Return log p(x), in nats, of shape (N,)."""
        return self.log_joint(x).logsumexp(-1)

    def posterior(self, x: Tensor) -> Categorical:
        """Return p(y | x), of batch shape (N,)."""
        return Categorical(logits=self.log_joint(x))


def mixture_elbo(model: Mixture, q: Categorical, x: Tensor) -> Tensor:
    """Return the ELBO of any q(y | x) of batch shape (N,), summed over y, in nats, of shape (N,)."""
    terms: Tensor = q.probs * (model.log_joint(x) - q.logits)
    return terms.sum(-1)


def _check_x(x: Tensor, weight: Tensor, width: int) -> None:
    check_tensor("x", x)
    fits = x.shape[1:] == (width,) and len(x) > 0 and x.dtype == weight.dtype
    expected = f"{weight.dtype} of shape (N, {width}), N at least 1"
    require(fits, "x", expected, f"{x.dtype} of shape {tuple(x.shape)}", f"pass x.to({weight.dtype})")


def _decoder(model: Model) -> tuple[Tensor, Tensor, Tensor]:
    """Return W, b and s^2."""
    linear, family = _layers(model.decoder)
    return linear.weight, linear.bias, family(linear.bias).base_dist.scale[0] ** 2


def _encoder(guide: Guide) -> nn.Linear:
    encoder: nn.Linear = _layers(guide.encoder)[0]
    return encoder


def _layers(net: Any) -> tuple[Any, Any]:
    linear, family = net
    return linear, family
