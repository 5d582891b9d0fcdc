"""Priors: distributions p(z) of the latent, modules () -> distribution."""

import math
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal, constraints

from pyro_vae.arguments import check_callable, check_tensor, given, require, whole_number
from pyro_vae.distributions.flows import CouplingFlow


class StandardNormal(nn.Module):
    """The prior p(z) = N(0, I).

    Args:
        dim: the number of latent dimensions D.

    Shape:
        batch ``()``, event ``(D,)``.

    Raises:
        ValueError: if dim is not a positive whole number.
    """

    zeros: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        dim = whole_number("StandardNormal, dim", dim, 1, "write StandardNormal(20), for example")
        # A buffer, so that the prior moves to a device with its model. It needs no saving.
        self.register_buffer("zeros", torch.zeros(dim), persistent=False)

    def forward(self) -> TorchDistribution:
        """Return N(0, I)."""
        return dist.Normal(self.zeros, torch.ones_like(self.zeros)).to_event(1)


class MixturePrior(nn.Module):
    r"""A mixture of K factorised Gaussians with learned weights, means and sigmas.

    :math:`p(z) = \sum_k \pi_k N(z; \mu_k, \mathrm{diag}\,\sigma_k^2)`. It starts with equal weights,
    means drawn from N(0, I) and unit sigmas.

    Args:
        dim: the number of latent dimensions D.
        components: K, the number of Gaussians.

    Shape:
        batch ``()``, event ``(D,)``.

    Raises:
        ValueError: if dim or components is not a positive whole number.

    References:
        Dilokthanakul et al. 2016, arXiv 1611.02648; Tomczak and Welling 2018, arXiv 1705.07120.
    """

    def __init__(self, dim: int, components: int) -> None:
        super().__init__()
        to_fix = "write MixturePrior(20, 10), for example"
        dim = whole_number("MixturePrior, dim", dim, 1, to_fix)
        components = whole_number("MixturePrior, components", components, 1, to_fix)
        self.logits = nn.Parameter(torch.zeros(components))
        self.mean = nn.Parameter(torch.randn(components, dim))
        self.log_sigma = nn.Parameter(torch.zeros(components, dim))

    def forward(self) -> TorchDistribution:
        """Return the mixture."""
        components = dist.Normal(self.mean, self.log_sigma.exp()).to_event(1)
        return _mixture(self.logits, components)


class VampPrior(nn.Module):
    r"""The mixture of the guide's posteriors at K learned pseudo-inputs.

    :math:`p(z) = \frac{1}{K} \sum_k q(z \mid u_k)`. The best prior for a guide is the mean of its posteriors
    over the data. This prior is their mean over a few inputs, which are learned::

        encoder = nn.Sequential(MLP(784, 400, 2 * 20), DiagNormal())  # q(z | x)
        model, guide = Model(VampPrior(encoder, x[:500]), decoder), Guide(encoder)

    Pass the encoder of the guide itself. Prior and guide then share one module, whose parameters are trained
    and counted once. Move, copy and save model and guide together. The pseudo-inputs are not bounded: they
    may leave the range of the data.

    Args:
        encoder: the encoder of the guide, a module x -> q(z | x).
        pseudo_inputs: the initial values of the K pseudo-inputs, ``(K, ...)``, for example data.

    Shape:
        batch ``()``, event as that of q.

    Raises:
        ValueError: if there are no pseudo-inputs, or they are not a tensor of floats.

    References:
        Tomczak and Welling 2018, arXiv 1705.07120.
    """

    equal: Tensor

    def __init__(self, encoder: nn.Module, pseudo_inputs: Tensor) -> None:
        super().__init__()
        check_callable("VampPrior, encoder", encoder, "pass the encoder of the guide")
        check_tensor("VampPrior, pseudo_inputs", pseudo_inputs)
        if not (pseudo_inputs.is_floating_point() and pseudo_inputs.dim() and len(pseudo_inputs)):
            raise ValueError(
                "VampPrior: expected K > 0 pseudo-inputs, floats of shape (K, ...) that fit the encoder, got "
                f"{tuple(pseudo_inputs.shape)} {pseudo_inputs.dtype}. To fix: pass some data, x[:500]."
            )
        self.encoder = encoder
        self.pseudo_inputs = nn.Parameter(pseudo_inputs.detach().clone())
        self.register_buffer("equal", torch.zeros(len(pseudo_inputs)), persistent=False)

    def forward(self) -> TorchDistribution:
        """Return the mixture of the q(z | u_k) with equal weights."""
        q = self.encoder(self.pseudo_inputs)  # q(z | u_k)
        of_each = isinstance(q, Distribution) and q.batch_shape[:1] == self.equal.shape
        expected = "a module from K pseudo-inputs to K distributions"
        to_fix = "pass the encoder of the guide, with its family, and some data"
        require(of_each, "VampPrior, encoder", expected, given(q), to_fix)
        return _mixture(self.equal, q)


class FlowPrior(nn.Module):
    r"""A normalising flow: z = f(e), e ~ N(0, I), where f is invertible and learned.

    :math:`\log p(z) = \log N(f^{-1}(z); 0, I) + \log |\det \partial f^{-1} / \partial z|`. It starts
    as N(0, I).

    Args:
        dim: the number of latent dimensions D, two or more.
        steps: the number of steps of the flow; each step moves every dimension.
        hidden: the width of the hidden layers of its networks.

    Shape:
        batch ``()``, event ``(D,)``.

    Raises:
        ValueError: as :class:`CouplingFlow`.

    References:
        Dinh et al. 2017, arXiv 1605.08803; Chen et al. 2017, arXiv 1611.02731 (as a VAE's prior).
    """

    def __init__(self, dim: int, steps: int = 4, hidden: int = 64) -> None:
        super().__init__()
        self.base = StandardNormal(dim)
        self.flow = CouplingFlow(dim, steps, hidden)

    def forward(self) -> TorchDistribution:
        """Return the distribution of f(e)."""
        return dist.TransformedDistribution(self.base(), self.flow())


def _mixture(logits: Tensor, components: Any) -> TorchDistribution:
    """Return the mixture of the components, batch shape ``(K,)``, weighted by the softmax of the logits."""
    if _is_diagonal_normal(components):
        return _NormalMixture(logits, components.base_dist.loc, components.base_dist.scale)
    return dist.MixtureSameFamily(dist.Categorical(logits=logits), components)


def _is_diagonal_normal(p: Any) -> bool:
    independent = isinstance(p, Independent) and p.reinterpreted_batch_ndims == 1
    return independent and isinstance(p.base_dist, Normal)


class _NormalMixture(TorchDistribution):
    """A mixture of K factorised Gaussians, event shape ``(D,)``, computed by matrix products.

    torch's MixtureSameFamily computes K D quotients per value. With K = 500 that costs ten times as much as
    the rest of a VAE.
    """

    arg_constraints: ClassVar = {
        "logits": constraints.real_vector,
        "loc": constraints.real,
        "scale": constraints.positive,
    }
    support = constraints.real_vector

    def __init__(self, logits: Tensor, loc: Tensor, scale: Tensor, batch_shape: Any = ()) -> None:
        self.logits, self.loc, self.scale = logits, loc, scale
        super().__init__(torch.Size(batch_shape), loc.shape[-1:])

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        return _NormalMixture(self.logits, self.loc, self.scale, batch_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        # (z - m)^2 w = z^2 w - 2 z m w + m^2 w with w = 1 / s^2. If s is small, this is a difference of large
        # numbers, so it is computed in float64.
        loc, scale, z = self.loc.double(), self.scale.double(), value.double()
        weight = scale**-2
        distance = z**2 @ weight.mT - 2 * z @ (loc * weight).mT + (loc**2 * weight).sum(-1)
        constant = scale.log().sum(-1) + 0.5 * math.log(2 * math.pi) * loc.shape[-1]
        components = (-0.5 * distance - constant).to(value.dtype)
        log_prob = (self.logits.log_softmax(-1) + components).logsumexp(-1)
        return log_prob.expand(torch.broadcast_shapes(log_prob.shape, self.batch_shape))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            shape = torch.Size(sample_shape) + self.batch_shape
            k = dist.Categorical(logits=self.logits).sample(shape)
            return torch.normal(self.loc[k], self.scale[k])

    @property
    def mean(self) -> Tensor:
        mean = self.logits.softmax(-1) @ self.loc
        return mean.expand(self.batch_shape + self.event_shape)
