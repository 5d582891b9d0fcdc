"""The distributions inside the likelihoods that torch and Pyro lack, with -inf outside the support.

Each describes single pixels, except :class:`IndependentBernoulli`, which is joint over the pixels of an
image. The families in :mod:`pyro_vae.distributions.likelihoods` compute their parameters from features, and
make the others joint over an image by ``to_event(1)``.
"""

import math
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.kl import register_kl


class ZeroOutsideSupport:
    """A distribution whose ``log_prob`` is -inf outside its support, also for NaN.

    It uses only tensor operations, so it also works in a compiled graph, where nothing can raise an error.
    With validation on, torch raises its ValueError for such a value instead. A subclass implements
    ``_log_prob`` for values in the support.
    """

    # What messages and tables call the distribution: the name of its public family.
    family_name: ClassVar[str]

    def log_prob(self, value: Tensor) -> Tensor:
        this: Any = self
        if this._validate_args:
            this._validate_sample(value)
        inside = this.support.check(value)
        return this._log_prob(value.masked_fill(~inside, 0.0)).masked_fill(~inside, -math.inf)


class BernoulliDistribution(ZeroOutsideSupport, dist.Bernoulli):
    """A Bernoulli distribution with the logit as its parameter."""

    family_name = "Bernoulli"

    def _log_prob(self, value: Tensor) -> Tensor:
        # log p(1) = -softplus(-l), log p(0) = -softplus(l): no difference of large numbers.
        # 2.0 converts to float: uint8 cannot hold -1.
        return -F.softplus((1 - 2.0 * value) * self.logits)


class IndependentBernoulli(dist.Independent):
    """The joint distribution of D independent Bernoulli pixels, event shape ``(D,)``.

    ``IndependentBernoulli(BernoulliDistribution(logits=l), 1)`` has the same values as
    ``BernoulliDistribution(logits=l).to_event(1)``. It is faster: it takes one logarithm for up to 32 pixels,
    and the gradient is in closed form.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        pixels: Any = self.base_dist
        if self.reinterpreted_batch_ndims != 1:
            return super().log_prob(value)
        if pixels._validate_args:
            pixels._validate_sample(value)
        if not value.is_floating_point():
            value = value.to(pixels.logits.dtype)
        # x - x^2 is zero only at 0 and 1. Summing its absolute value costs less than boolean masks.
        outside = torch.addcmul(value, value, value, value=-1).abs().sum(-1) != 0
        total: Tensor = SumOfLogProbs.apply(*torch.broadcast_tensors(value, pixels.logits))
        return total.masked_fill(outside, -math.inf)


class SumOfLogProbs(torch.autograd.Function):
    """sum_i log Ber(x_i; l_i) over the last dimension, with gradient x - sigmoid(l) in l, and l in x.

    The gradient in l replaces x by its sign, which is 0 for NaN. So a wrong pixel that is masked out
    afterwards has the gradient 0, not 0 times NaN.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, logits: Tensor) -> Tensor:
        # log Ber(x; l) = -softplus(t), t = l at a pixel 0 and t = -l at 1: no difference of large numbers.
        # softplus(t) = max(t, 0) - log sigmoid(|l|). The sum of logarithms is the logarithm of the product.
        # The factors lie between 1/2 and 1, so a product of 32 stays far above the smallest float.
        factors = logits.abs().sigmoid()
        for _ in range(5):
            if factors.shape[-1] % 2 == 0:
                factors = torch.mul(*factors.chunk(2, -1))
        return factors.log().sum(-1) - (torch.rsub(x, 1, alpha=2) * logits).relu().sum(-1)

    @staticmethod
    def slope(x: Tensor, logits: Tensor) -> Tensor:
        """Return the derivative with respect to each logit."""
        return x.sign() - logits.sigmoid()

    @staticmethod
    def setup_context(context: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        context.save_for_backward(*inputs)
        context.save_for_forward(*inputs)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, logits = context.saved_tensors
        gradient = gradient.unsqueeze(-1)
        return gradient * logits, gradient * SumOfLogProbs.slope(x, logits)

    @staticmethod
    def jvp(context: Any, x_tangent: Tensor | None, logits_tangent: Tensor | None) -> Tensor:
        x, logits = context.saved_tensors
        from_x = 0 if x_tangent is None else x_tangent * logits
        from_logits = 0 if logits_tangent is None else logits_tangent * SumOfLogProbs.slope(x, logits)
        return torch.as_tensor(from_x + from_logits).sum(-1)


class ContinuousBernoulliDistribution(ZeroOutsideSupport, dist.ContinuousBernoulli):
    """The continuous Bernoulli, p(x) = l exp(l x) / (exp(l) - 1) on [0, 1], with the logit l as parameter.

    torch computes the normaliser and the mean from clamped probabilities, so they stop changing near l = 16.
    Here everything is computed from the logit. Near l = 0 the formulas are 0 / 0, so their Taylor series
    replace them.
    """

    family_name = "ContinuousBernoulli"

    def _near_zero(self) -> tuple[Tensor, Tensor]:
        near = self.logits.abs() < 0.2
        return near, self.logits.masked_fill(near, 1.0)

    def _log_prob(self, value: Tensor) -> Tensor:
        near, away = self._near_zero()
        series = math.log(2) + self.logits**2 / 12 - 7 * self.logits**4 / 1440
        log_norm = torch.where(near, series, (away / torch.tanh(away / 2)).log())
        return value * self.logits - F.softplus(self.logits) + log_norm

    @property
    def mean(self) -> Tensor:
        near, away = self._near_zero()
        series = self.logits / 12 - self.logits**3 / 720
        return 0.5 + torch.where(near, series, 0.5 / torch.tanh(away / 2) - 1 / away)

    def icdf(self, value: Tensor) -> Tensor:
        # The density for -l is the mirror image of the density for l. Solve for -|l|, which cannot overflow.
        mirrored = self.logits > 0
        slope = -self.logits.abs().clamp(min=1e-6)
        x = torch.log1p(torch.where(mirrored, 1 - value, value) * torch.expm1(slope)) / slope
        return torch.where(mirrored, 1 - x, x)


class Grid(constraints.Constraint):
    """Values on the grid k / (K - 1), k = 0 .. K - 1.

    Args:
        levels: K.
    """

    is_discrete = True

    def __init__(self, levels: int) -> None:
        self.levels = levels
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        level = value * (self.levels - 1)
        # A thousandth of a level: far above float32's rounding errors, far below the error of a wrong grid.
        return (value >= 0) & (value <= 1) & ((level - level.round()).abs() < 1e-3)

    def __repr__(self) -> str:
        return f"the grid k / {self.levels - 1}, k = 0 .. {self.levels - 1}"


class GridDistribution(ZeroOutsideSupport, TorchDistribution):
    """A distribution of one pixel over the grid k / (K - 1), k = 0 .. K - 1."""

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    levels: int

    @property
    def support(self) -> constraints.Constraint:
        return Grid(self.levels)


class CategoricalOnGrid(GridDistribution):
    """A softmax over the K levels, which ignores their order; logits ``(*batch, K)``."""

    family_name = "Categorical"
    arg_constraints: ClassVar = {"logits": constraints.real_vector}

    def __init__(self, logits: Tensor) -> None:
        self.logits, self.levels = logits, logits.shape[-1]
        super().__init__(logits.shape[:-1])

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        return CategoricalOnGrid(self.logits.expand(*batch_shape, -1))

    def _log_prob(self, value: Tensor) -> Tensor:
        level = (value * (self.levels - 1)).round().long()
        level, normaliser = torch.broadcast_tensors(level, self.logits.logsumexp(-1))
        logits = self.logits.expand(*level.shape, -1)
        return logits.gather(-1, level.unsqueeze(-1)).squeeze(-1) - normaliser

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            level = dist.Categorical(logits=self.logits).sample(sample_shape)
            return level.to(self.logits.dtype) / (self.levels - 1)

    @property
    def mean(self) -> Tensor:
        grid = torch.linspace(0, 1, self.levels, dtype=self.logits.dtype, device=self.logits.device)
        return self.logits.softmax(-1) @ grid


class DiscretizedLogisticDistribution(GridDistribution):
    """A logistic density, integrated over the bin of each of the K levels; parameters ``(*batch)``."""

    family_name = "DiscretizedLogistic"
    arg_constraints: ClassVar = {"loc": constraints.real, "log_scale": constraints.real}

    def __init__(self, loc: Tensor, log_scale: Tensor, levels: int) -> None:
        self.loc, self.log_scale, self.levels = loc, log_scale, levels
        super().__init__(loc.shape)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        return DiscretizedLogisticDistribution(
            self.loc.expand(batch_shape), self.log_scale.expand(batch_shape), self.levels
        )

    def _log_prob(self, value: Tensor) -> Tensor:
        # With s the logistic function and a > b the scaled edges of the bin,
        # s(a) - s(b) = s(a) s(-b) (1 - exp(b - a)): the logarithm of each factor, never of a difference.
        half_bin = 0.5 / (self.levels - 1)
        per_scale = (-self.log_scale).exp()
        above = (value + half_bin - self.loc) * per_scale
        below = (value - half_bin - self.loc) * per_scale
        width = 2 * half_bin * per_scale
        inside = F.logsigmoid(above) + F.logsigmoid(-below) + (-torch.expm1(-width)).log()
        # The first and the last bin contain the tails.
        left, right = value < half_bin, value > 1 - half_bin
        return torch.where(left, F.logsigmoid(above), torch.where(right, F.logsigmoid(-below), inside))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            shape = self._extended_shape(sample_shape)
            uniform = torch.rand(shape, dtype=self.loc.dtype, device=self.loc.device)
            x = self.loc + self.log_scale.exp() * torch.logit(uniform, eps=1e-6)
            return (x.clamp(0, 1) * (self.levels - 1)).round() / (self.levels - 1)

    @property
    def mean(self) -> Tensor:
        # E[k] is the sum of P(k >= j) over j = 1 .. K - 1. One j at a time, to save memory.
        top, per_scale = self.levels - 1, (-self.log_scale).exp()
        total = torch.zeros_like(self.loc)
        for level in range(1, self.levels):
            total = total + torch.sigmoid((self.loc - (level - 0.5) / top) * per_scale)
        return total / top


@register_kl(torch.distributions.MultivariateNormal, torch.distributions.Independent)
def _kl_full_normal_diag_normal(p: Any, q: Any) -> Tensor:
    """Return KL(N1 || N2) = 1/2 [log |S2| / |S1| - d + tr(S2^-1 S1) + (m2 - m1)^T S2^-1 (m2 - m1)].

    For a diagonal S2: the KL of a FullNormal guide to a StandardNormal prior, which torch and Pyro lack.
    """
    if not isinstance(q.base_dist, torch.distributions.Normal) or q.reinterpreted_batch_ndims != 1:
        raise NotImplementedError
    variance = q.base_dist.scale**2
    log_determinants = variance.log().sum(-1) - 2 * p.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    traces = (p.scale_tril.square().sum(-1) / variance).sum(-1)
    distance = ((q.base_dist.loc - p.loc).square() / variance).sum(-1)
    return 0.5 * (log_determinants - p.event_shape[0] + traces + distance)
