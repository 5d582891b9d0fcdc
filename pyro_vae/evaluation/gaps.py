"""Inference gaps: which part of log p(x) - ELBO comes from the guide's family, and which from its encoder."""

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from pyro.distributions import Delta
from pyro.distributions import TransformedDistribution as Transformed
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.distributions.transforms import AffineCoupling
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import (
    AffineTransform,
    Independent,
    Transform,
    TransformedDistribution,
    constraints,
    transform_to,
)

from pyro_vae.arguments import whole_number
from pyro_vae.evaluation import weights
from pyro_vae.evaluation.chunks import checked_chunks, chunks
from pyro_vae.evaluation.weights import draw_weights, log_densities
from pyro_vae.optimiser import lay_out
from pyro_vae.programs import Batch, Pair, Program, as_args
from pyro_vae.programs.dependencies import check_alone
from pyro_vae.programs.faults import locate
from pyro_vae.programs.plates import find_layout
from pyro_vae.programs.traces import EvaluationError, family, innermost, latent_sites
from pyro_vae.table import Table, table_of_means

# Draws of each data point in a step, and the first learning rate of Adam. The rate falls to 0 along a cosine.
_DRAWS, _LEARNING_RATE = 8, 0.05


class InferenceGaps(NamedTuple):
    """Where the distance between log p(x) and the ELBO comes from. ``print`` and a notebook show the means.

    Attributes:
        approximation: log p(x) - ELBO(q*), the gap of the best q* in the guide's family, in nats, (N,).
        amortisation: ELBO(q*) - ELBO(q), the further loss of the encoder's q, in nats, (N,).
        approximation_error: its Monte Carlo standard error, in nats, (N,).
        amortisation_error: its Monte Carlo standard error, in nats, (N,).
        log_evidence: log p(x), by importance samples from q*, in nats, (N,).
        elbo: ELBO(q) of the unchanged guide, in nats, (N,).
    """

    approximation: Tensor
    amortisation: Tensor
    approximation_error: Tensor
    amortisation_error: Tensor
    log_evidence: Tensor
    elbo: Tensor

    def __str__(self) -> str:
        return str(self._table())

    def _repr_html_(self) -> str:
        return self._table()._repr_html_()

    def _table(self) -> Table:
        fields = self._asdict().items()
        rows = {name.replace("_", " "): values for name, values in fields if not name.endswith("error")}
        return table_of_means(rows, self.elbo)


def inference_gaps(
    model: Program, guide: Program, batch: Batch, num_steps: int = 1000, num_samples: int = 1000
) -> InferenceGaps:
    r"""Split log p(x) - ELBO into what the guide's family costs and what its encoder costs.

    :math:`\log p(x) - \mathrm{ELBO}(q) = [\log p(x) - \mathrm{ELBO}(q^*)] +
    [\mathrm{ELBO}(q^*) - \mathrm{ELBO}(q)]`. q* is the best member of the family for each data point. The
    parameters of its distribution are free and start at the encoder's values. Gradients without the score
    (STL) optimise them. A large first term asks for a richer family. A large second term asks for a larger
    encoder or a longer training.

    The free parameters are those of the distributions (location, scale or covariance), and the location,
    scale and context of a flow. The networks of a flow do not change: they belong to the family. A constant
    that does not depend on the guide's parameters does not change either. Scales are left out and masks are
    kept, as in :func:`~pyro_vae.elbo_terms`. Modules are in eval mode, and only the random state changes.

    If the optimisation ends too early, approximation is too large and amortisation too small. To find out,
    use twice as many steps.

    Args:
        model: a Pyro model with all sites inside the plate of the data.
        guide: a Pyro guide. The distributions of its latent sites depend only on the data, not on other
            latents.
        batch: the data, a tensor ``(N, ...)`` or a tuple of the model's arguments.
        num_steps: steps of the optimisation of each data point's q*.
        num_samples: draws of each data point for the ELBOs and for log p(x), at least 2.

    Returns:
        Both gaps of each data point, with their errors.

    Raises:
        ValueError: if a latent's distribution depends on another latent, has no ``rsample``, or is of a
            family whose parameters are not known; if num_steps or num_samples is too small; else as
            :func:`~pyro_vae.log_evidence`.

    References:
        Cremer et al. 2018, Inference Suboptimality in Variational Autoencoders, arXiv 1801.03558.
    """
    num_steps = whole_number("num_steps", num_steps, 1, "pass 1000, for example")
    num_samples = whole_number("num_samples", num_samples, 2, "pass 1000, for example; one draw has no error")
    pair = Pair(model, guide, as_args(batch))
    found: list[list[Tensor]] = []
    with torch.inference_mode(False), pair.evaluating():
        checked_chunks(pair, weights.rows_at_once(pair))
        for chunk in chunks(pair, weights.rows_at_once(pair) // _DRAWS):
            if not found:
                with chunk.trial(), chunk.isolated(validate=False):
                    traces = chunk.trace()
                check_alone(chunk, traces, model=False)
            best = _optimise(chunk, num_steps)
            elbo, elbo_error, _, _ = _bounds(chunk, num_samples)
            best_elbo, best_error, evidence, gap_error = _bounds(best, num_samples)
            errors = [gap_error, torch.hypot(best_error, elbo_error)]
            found.append([evidence - best_elbo, best_elbo - elbo, *errors, evidence, elbo])
    return InferenceGaps(*map(torch.cat, zip(*found, strict=True)))


def _bounds(pair: Pair, num_samples: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the ELBO and its error, log p(x), and the error of log p(x) - ELBO, each (N,)."""
    ((_, blocks),) = draw_weights(pair, num_samples, side_by_side=_DRAWS)
    log_w = torch.cat(list(blocks)).double()
    evidence = log_w.logsumexp(0) - math.log(num_samples)
    root = num_samples**0.5
    # Both are of the same draws: by the delta method, their difference has the noise of w / mean w - log w.
    gap_error = ((log_w - evidence).exp() - log_w).std(0) / root
    return log_w.mean(0), log_w.std(0) / root, evidence, gap_error


def _optimise(pair: Pair, num_steps: int) -> Pair:
    """Return the pair with the best member of the guide's family for each data point."""
    with _all_require_grad(pair), torch.enable_grad(), pair.isolated(validate=False):
        sites = latent_sites(pair.trace().guide)
        free = _Free()
        drawn = {name: free(f"Site '{name}' of the guide", site["fn"]) for name, site in sites.items()}
    leaves = list(free.leaves.values())
    local = pair.wrapped(guide=_Local(drawn)(pair.guide))
    with local.isolated(validate=False):
        layout = find_layout(local, particles=True)
    several = layout.with_enumeration(layout.with_particles(local, _DRAWS))
    # A short memory of squares, since the first gradients of a bad encoder may be huge.
    optimizer = torch.optim.Adam(leaves, lr=_LEARNING_RATE, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    for _ in range(num_steps):
        with torch.enable_grad(), several.isolated(validate=False):
            log_p, log_q = log_densities(several.trace(), layout)
            loss = (log_q - log_p).mean(0).sum()
            gradients = torch.autograd.grad(loss, leaves)
        if not loss.isfinite():
            raise ValueError(locate(pair, "The ELBO is not finite"))
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf.grad = gradient
        lay_out(optimizer)
        optimizer.step()
        schedule.step()
    return local


class _Local(Messenger):
    """Gives sites of the guide distributions with free parameters, which do not come from the encoder.

    A gradient passes through a draw, but not through its log q: the score has mean 0 (STL).
    """

    def __init__(self, distributions: dict[str, Callable[[bool], Any]]) -> None:
        super().__init__()
        self.distributions = distributions

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.distributions:
            distribution = self.distributions[msg["name"]]
            msg["fn"] = _PathOnly(distribution(False), distribution(True))


class _PathOnly(TorchDistribution):
    """Draws from a distribution; log_prob is that of the same one with parameters that take no gradient."""

    has_rsample = True

    def __init__(self, drawn: Any, judged: Any) -> None:
        self.drawn, self.judged = drawn, judged
        super().__init__(drawn.batch_shape, drawn.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        return self.judged.support

    def expand(self, batch_shape: Any, _instance: Any = None) -> "_PathOnly":
        return _PathOnly(self.drawn.expand(batch_shape), self.judged.expand(batch_shape))

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        drawn: Tensor = self.drawn.rsample(sample_shape)
        return drawn

    def log_prob(self, value: Tensor) -> Tensor:
        log_prob: Tensor = self.judged.log_prob(value)
        return log_prob


class _Free:
    """Makes the parameters of distributions free.

    A call takes a distribution and returns a function. Its argument says whether to hold the parameters
    fixed; its result is the distribution.

    Attributes:
        leaves: id of the initial tensor -> the free parameter.
    """

    def __init__(self) -> None:
        self.leaves: dict[int, Tensor] = {}

    def __call__(self, subject: str, fn: Any) -> Callable[[bool], Any]:
        before = len(self.leaves)
        make = self._distribution(subject, fn)
        if len(self.leaves) == before:
            _refuse(subject, fn, " with parameters that no module of the guide computes")
        return make

    def _distribution(self, subject: str, fn: Any) -> Callable[[bool], Any]:
        if isinstance(fn, Independent):
            base = self._distribution(subject, fn.base_dist)
            return lambda fixed: base(fixed).to_event(fn.reinterpreted_batch_ndims)
        if isinstance(fn, TransformedDistribution):
            base = self._distribution(subject, fn.base_dist)
            transforms = [self._transform(subject, fn, each) for each in fn.transforms]
            return lambda fixed: Transformed(base(fixed), [make(fixed) for make in transforms])
        given = {name: vars(fn).get(name) for name in fn.arg_constraints}
        given = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        if not given or not fn.has_rsample or isinstance(fn, Delta):
            _refuse(subject, fn)
        made = {name: self._parameter(value, fn.arg_constraints[name]) for name, value in given.items()}
        return lambda fixed: type(fn)(**{name: make(fixed) for name, make in made.items()})

    def _transform(self, subject: str, fn: Any, transform: Transform) -> Callable[[bool], Transform]:
        if isinstance(transform, AffineTransform):
            loc, scale = map(torch.as_tensor, (transform.loc, transform.scale))
            sign = constraints.positive if (scale > 0).all() else constraints.real
            shift, size, dim = self._parameter(loc), self._parameter(scale, sign), transform.event_dim
            return lambda fixed: AffineTransform(shift(fixed), size(fixed), dim)
        network = getattr(transform, "nn", None)
        if isinstance(transform, AffineCoupling) and isinstance(network, functools.partial):
            context = self._parameter(network.keywords["context"])
            stays, inner = transform.split_dim, network.func
            return lambda fixed: AffineCoupling(
                stays, functools.partial(inner, *network.args, context=context(fixed))
            )
        if any(isinstance(value, Tensor) and value.requires_grad for value in vars(transform).values()):
            _refuse(subject, fn)
        return lambda fixed: transform

    def _parameter(self, value: Tensor, constraint: Any = constraints.real) -> Callable[[bool], Tensor]:
        """Return a tensor as a function; it is a free leaf if a module computes it."""
        if not value.requires_grad:
            return lambda fixed: value
        constrain = transform_to(constraint)
        start = constrain.inv(value.detach()).detach().clone()
        leaf = self.leaves.setdefault(id(value), start.requires_grad_())
        return lambda fixed: constrain(leaf.detach() if fixed else leaf)


def _refuse(subject: str, fn: Any, but: str = "") -> None:
    raise EvaluationError(
        f"{subject}: expected a distribution whose parameters come from the guide's modules and are known, "
        "as those of Normal, MultivariateNormal, DiagNormal, FullNormal and FlowNormal, got "
        f"{family(innermost(fn))}{but}. To fix: use one of these families, with parameters from a module."
    )


@contextmanager
def _all_require_grad(pair: Pair) -> Iterator[None]:
    """Let all parameters require gradients, so that what depends on them shows."""
    frozen = [p for p in pair.parameters if not p.requires_grad]
    try:
        for p in frozen:
            p.requires_grad_(True)
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)
