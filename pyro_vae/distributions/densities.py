"""Distributions that torch and Pyro lack, or that must be -inf outside their support.

They are over single pixels, but for :class:`Bernoullis`; :mod:`pyro_vae.families` makes them of features,
and joint over an image by ``to_event(1)``.
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


class OnSupport:
    """A distribution whose ``log_prob`` is -inf outside its support, NaN included.

    Plain tensor operations, so that it holds in a compiled graph as well, where nothing can raise.
    With validation on, such a value is torch's ValueError instead.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        this: Any = self
        if this._validate_args:
            this._validate_sample(value)
        inside = this.support.check(value)
        return this._log_prob(value.masked_fill(~inside, 0.0)).masked_fill(~inside, -math.inf)


class Bernoulli(OnSupport, dist.Bernoulli):
    """A Bernoulli by its logit."""

    def _log_prob(self, value: Tensor) -> Tensor:
        # log p(1) = -softplus(-l), log p(0) = -softplus(l): no difference of large numbers.
        return -F.softplus((1 - 2.0 * value) * self.logits)  # 2.0, as 8 bits cannot hold -1


class Bernoullis(dist.Independent):
    """Independent Bernoulli pixels, jointly: ``Bernoullis(Bernoulli(logits=l), 1)``, event shape ``(D,)``.

    The same as ``Bernoulli(logits=l).to_event(1)``, and faster: one logarithm serves up to 32 pixels, and the
    gradient is the closed form.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        each: Any = self.base_dist
        if self.reinterpreted_batch_ndims != 1:
            return super().log_prob(value)
        if each._validate_args:
            each._validate_sample(value)
        if not value.is_floating_point():
            value = value.to(each.logits.dtype)
        # x - x^2 is zero at 0 and 1 alone, and to add it up costs less than masks do.
        outside = torch.addcmul(value, value, value, value=-1).abs().sum(-1) != 0
        total: Tensor = SumOfLogProbs.apply(*torch.broadcast_tensors(value, each.logits))
        return total.masked_fill(outside, -math.inf)


class SumOfLogProbs(torch.autograd.Function):
    """sum_i log Ber(x_i; l_i) over the last dimension; its gradients: x - sigmoid(l) by l, and l by x.

    There a pixel other than 0 and 1 counts as its sign, 0 for NaN: what is masked out afterwards then has the
    gradient 0, and not 0 times NaN.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, logits: Tensor) -> Tensor:
        # log Ber(x; l) = -softplus(t) where t is l at a pixel 0 and -l at 1: no difference of large numbers.
        # softplus(t) = max(t, 0) - log sigmoid(|l|), and a sum of logarithms is that of a product, whose
        # factors lie between 1/2 and 1: 32 of them stay far above the smallest float.
        factors = logits.abs().sigmoid()
        for _ in range(5):
            if factors.shape[-1] % 2 == 0:
                factors = torch.mul(*factors.chunk(2, -1))
        return factors.log().sum(-1) - (torch.rsub(x, 1, alpha=2) * logits).relu().sum(-1)

    @staticmethod
    def slope(x: Tensor, logits: Tensor) -> Tensor:
        """Return the derivative by each logit."""
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
    def jvp(context: Any, by_x: Tensor | None, by_logits: Tensor | None) -> Tensor:
        x, logits = context.saved_tensors
        along_x = 0 if by_x is None else by_x * logits
        along_logits = 0 if by_logits is None else by_logits * SumOfLogProbs.slope(x, logits)
        return torch.as_tensor(along_x + along_logits).sum(-1)


class ContinuousBernoulli(OnSupport, dist.ContinuousBernoulli):
    """Everything in terms of the logit l, in which p(x) = l exp(l x) / (exp(l) - 1) on [0, 1].

    torch's own goes through clamped probabilities: its normaliser and mean stop near l = 16.
    Near l = 0 the formulas are 0 / 0 and their Taylor series take over.
    """

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
        # The density at -l is the mirror image of that at l: solve for -|l|, which cannot overflow.
        mirrored = self.logits > 0
        slope = -self.logits.abs().clamp(min=1e-6)
        x = torch.log1p(torch.where(mirrored, 1 - value, value) * torch.expm1(slope)) / slope
        return torch.where(mirrored, 1 - x, x)


class GreyLevels(constraints.Constraint):
    """The grid k / (K - 1), k = 0 .. K - 1."""

    is_discrete = True

    def __init__(self, levels: int) -> None:
        self.levels = levels
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        level = value * (self.levels - 1)
        # A thousandth of a level is far above float32's rounding and far below a wrong grid.
        return (value >= 0) & (value <= 1) & ((level - level.round()).abs() < 1e-3)

    def __repr__(self) -> str:
        return f"the grid k / {self.levels - 1}, k = 0 .. {self.levels - 1}"


class Grey(OnSupport, TorchDistribution):
    """A distribution on the grey levels k / (K - 1), described by parameters of one batch shape."""

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    levels: int

    @property
    def support(self) -> constraints.Constraint:
        return GreyLevels(self.levels)


class GreyCategorical(Grey):
    """A softmax over the levels, in no order."""

    arg_constraints: ClassVar = {"logits": constraints.real_vector}

    def __init__(self, logits: Tensor) -> None:
        self.logits, self.levels = logits, logits.shape[-1]
        super().__init__(logits.shape[:-1])

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        return GreyCategorical(self.logits.expand(*batch_shape, -1))

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


class DiscretizedLogistic(Grey):
    """A logistic density, integrated over the bin of each level."""

    arg_constraints: ClassVar = {"loc": constraints.real, "log_scale": constraints.real}

    def __init__(self, loc: Tensor, log_scale: Tensor, levels: int) -> None:
        self.loc, self.log_scale, self.levels = loc, log_scale, levels
        super().__init__(loc.shape)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        return DiscretizedLogistic(
            self.loc.expand(batch_shape), self.log_scale.expand(batch_shape), self.levels
        )

    def _log_prob(self, value: Tensor) -> Tensor:
        # With s the logistic function and a > b the bin's scaled edges,
        # s(a) - s(b) = s(a) s(-b) (1 - exp(b - a)): three logarithms, none of a difference.
        half_bin = 0.5 / (self.levels - 1)
        per_scale = (-self.log_scale).exp()
        above = (value + half_bin - self.loc) * per_scale
        below = (value - half_bin - self.loc) * per_scale
        width = 2 * half_bin * per_scale
        inside = F.logsigmoid(above) + F.logsigmoid(-below) + (-torch.expm1(-width)).log()
        # The end bins take the tails.
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
        # E[k] is the sum of P(k >= j) over j = 1 .. K - 1, one j at a time to bound the memory.
        top, per_scale = self.levels - 1, (-self.log_scale).exp()
        total = torch.zeros_like(self.loc)
        for level in range(1, self.levels):
            total = total + torch.sigmoid((self.loc - (level - 0.5) / top) * per_scale)
        return total / top


@register_kl(torch.distributions.MultivariateNormal, torch.distributions.Independent)
def _kl_full_normal_diag_normal(p: Any, q: Any) -> Tensor:
    """KL(N1 || N2) = 1/2 [log |S2| / |S1| - d + tr(S2^-1 S1) + (m2 - m1)^T S2^-1 (m2 - m1)].

    Registered for a diagonal S2, the pair that torch and Pyro lack and that a FullNormal guide and
    a StandardNormal prior are.
    """
    if not isinstance(q.base_dist, torch.distributions.Normal) or q.reinterpreted_batch_ndims != 1:
        raise NotImplementedError
    variance = q.base_dist.scale**2
    log_determinants = variance.log().sum(-1) - 2 * p.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    traces = (p.scale_tril.square().sum(-1) / variance).sum(-1)
    distance = ((q.base_dist.loc - p.loc).square() / variance).sum(-1)
    return 0.5 * (log_determinants - p.event_shape[0] + traces + distance)
