"""Evaluation: evidence, the ELBO's terms, generation, reconstruction, from traces alone.

Nothing here knows a model's insides: it needs a plate "data" around every site, and works as well
on several latent sites and on models written elsewhere. A discrete site of the model that is marked
``infer={"enumerate": "parallel"}`` and absent from the guide is summed out exactly. All of it runs in
eval mode and without gradients, and moves nothing but the random state. A batch is what model and guide
take: a tensor, or a tuple of arguments whose tensors of the first one's length are per datum.
"""

import functools
import math
from collections.abc import Iterable, Iterator
from numbers import Integral
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions import Unit
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.infer import infer_discrete
from torch import Tensor

from pyro_vae.compiled.graph import Graph
from pyro_vae.elbos.checks import check_whole, locate
from pyro_vae.programs.pair import Batch, Before, Program, as_args, evaluating, own_parameters
from pyro_vae.programs.plates import Layout, layout
from pyro_vae.programs.traces import latent_sites, observed_sites, per_datum, sample_sites, traces

# Data times samples in one pass, and samples among them. Large enough that the cost of handlers and guide
# vanishes beside the decoder's matrix products, small enough for their results to stay in the cache.
_ROWS, _SAMPLES = 2048, 128


class LogEvidence(NamedTuple):
    """The importance-weighted bound on log p(x), for every datum.

    Attributes:
        values: the bound in nats, (N,).
        standard_error: its Monte Carlo standard error in nats, (N,), by the delta method; NaN with
            one sample. It tells of the noise, not of the gap to log p(x).
    """

    values: Tensor
    standard_error: Tensor

    def mean(self) -> Tensor:
        """Return the mean over the data, in nats a datum."""
        return self.values.mean()


class ELBOTerms(NamedTuple):
    """The ELBO and its two parts, for every datum.

    Attributes:
        elbo: E_q[log p(x, z) - log q(z | x)], reconstruction - kl, in nats, (N,).
        reconstruction: E_q[log p(x | z)], in nats, (N,).
        kl: E_q[log q(z | x) - log p(z)], in nats, (N,).
    """

    elbo: Tensor
    reconstruction: Tensor
    kl: Tensor


def log_evidence(
    model: Program, guide: Program, batch: Batch, num_samples: int = 1000, *, compiled: bool = False
) -> LogEvidence:
    r"""Estimate log p(x) of every datum by importance sampling from the guide.

    :math:`\log \frac{1}{K} \sum_k p(x, z_k) / q(z_k | x)` with z_k from q: a lower bound in
    expectation, that rises to log p(x) with K. Where the model enumerates discrete sites k that the guide
    leaves out, p(x, z) is :math:`\sum_k p(x, z, k)`, exactly. Scales (a KL weight, a subsampled plate)
    are left out and masks are kept: it is the evidence of the model, whatever it was trained with.

    Samples are drawn side by side in a plate where model and guide take the extra dimension on the
    left, and one after the other where they do not, which is tried out on every size of chunk.
    Memory is bounded by a chunk of data times samples, whatever their numbers. Nearly all of the time goes
    into the decoder's matrix products; ``torch.autocast`` around the call makes them of reduced precision.

    Args:
        model: makes Pyro statements, all sites inside a plate "data".
        guide: likewise, for the latent sites.
        batch: the data, a tensor ``(N, ...)`` or a tuple of the model's arguments.
        num_samples: K, importance samples a datum.
        compiled: compile a chunk's weights, as :class:`~pyro_vae.CompiledELBO` compiles a step: some
            seconds that pay where there are many data and samples. A last chunk of fewer data runs
            uncompiled. The pair must have static structure.

    Returns:
        The bound and its standard error, in nats a datum.

    Raises:
        ValueError: if num_samples is not positive, the batch does not fit, a site stands outside
            the plate "data" or in a subsampled plate inside it, or a weight is not finite; with
            ``compiled``, if the pair cannot be captured.

    References:
        Burda et al. 2015, arXiv 1509.00519.
    """
    if not isinstance(num_samples, Integral) or num_samples < 1:
        raise ValueError(f"num_samples is a positive whole number, got {num_samples}.")
    num_samples = int(num_samples)
    # In the fewest runs that are all alike; what the last draws too many is dropped.
    at_once = math.ceil(num_samples / math.ceil(num_samples / _SAMPLES))
    dtype = torch.get_default_dtype()
    graphs: dict[int, Graph] = {}
    particle_dims: dict[int, int | None] = {}

    def particle_dim(args: tuple[Any, ...]) -> int | None:
        size = len(args[0])
        if size not in particle_dims:
            with own_parameters(model, guide, validate=False):
                particle_dims[size] = layout(model, guide, args, {}, particles=True).particle_dim
        return particle_dims[size]

    with evaluating(model, guide):
        head = next(_chunks(batch, _ROWS // at_once))
        summed = _check(model, guide, head).enumerated(model)
        if not particle_dim(head):
            at_once = 1  # and more data instead
        rows = _ROWS // at_once
        # Log sum w and log sum w^2, merged draw by draw. Made once, for all data: small tensors that are made
        # between the large ones of a chunk, and stay, cut memory into pieces too small for the next chunk.
        sums = head[0].new_full((2, len(as_args(batch)[0])), -math.inf, dtype=torch.float64)
        for args, (first, second) in zip(_chunks(batch, rows), sums.split(rows, 1), strict=True):
            size, dim = len(args[0]), particle_dim(args)
            step = at_once if dim else 1
            before = Before(model, guide)
            weigh = graphs.get(size) or functools.partial(
                _log_weights, summed, guide, particle_dim=dim, particles=step
            )
            if compiled and not graphs:
                weigh = graphs[size] = Graph(weigh, (summed, guide), (args,), {}).compile()
            for done in range(0, num_samples, step):
                log_w = weigh(args)[: num_samples - done]
                dtype, log_w = log_w.dtype, log_w.double()
                torch.logaddexp(first, log_w.logsumexp(0), out=first)
                torch.logaddexp(second, (2 * log_w).logsumexp(0), out=second)
            if not first.isfinite().all():
                before.restore()
                raise ValueError(locate(model, guide, args, {}, "The evidence is not finite"))
    first, second = sums
    # Var(mean w) / mean(w)^2 = (K sum w^2 / (sum w)^2 - 1) / (K - 1)
    log_k = math.log(num_samples)
    spread = torch.expm1((log_k + second - 2 * first).clamp(min=0))
    error = (spread / (num_samples - 1)).sqrt() if num_samples > 1 else spread * math.nan
    return LogEvidence((first - log_k).to(dtype), error.to(dtype))


def elbo_terms(model: Program, guide: Program, batch: Batch) -> ELBOTerms:
    """Estimate the ELBO of every datum and its parts, with one sample of the guide a datum.

    Always the plain ELBO: scales (a KL weight, a subsampled plate) are left out, masks are kept, and
    enumerated sites that the guide leaves out are summed out of both p(x, z) and p(z). The
    KL is by Monte Carlo, so a single datum's is noisy and can be negative; a mean over many is not.

    Args:
        model: makes Pyro statements, all sites inside a plate "data".
        guide: likewise, for the latent sites.
        batch: the data, a tensor ``(N, ...)`` or a tuple of the model's arguments.

    Returns:
        ELBO, reconstruction and KL, in nats a datum.

    Raises:
        ValueError: as :func:`log_evidence`.
    """
    chunks: list[tuple[Tensor, ...]] = []
    with evaluating(model, guide):
        for args in _chunks(batch, _ROWS):
            if not chunks:
                model = _check(model, guide, args).enumerated(model)
            before = Before(model, guide)
            model_trace, guide_trace = _traces(model, guide, args)
            latents = latent_sites(model_trace)
            posterior = _log_prob(guide_trace, dict(sample_sites(guide_trace)))
            prior = _log_prob(model_trace, latents)
            joint = _log_prob(model_trace, dict(sample_sites(model_trace)))
            elbo = joint - posterior
            if not elbo.isfinite().all():
                before.restore()
                raise ValueError(locate(model, guide, args, {}, "The ELBO is not finite"))
            chunks.append((elbo, joint - prior, (posterior - prior).expand_as(elbo)))
    return ELBOTerms(*(torch.cat(parts, -1).squeeze(0) for parts in zip(*chunks, strict=True)))


def generate(model: Program, batch: Batch) -> dict[str, TorchDistribution]:
    """Draw latents from the prior and return the likelihood of every observed site.

    ``generate(model, x)["x"].sample()`` are new images, ``.mean`` their expectations given z.

    Args:
        model: any model; its observations are ignored.
        batch: the model's arguments, which say how many to generate.

    Returns:
        Site name -> p(x | z), z ~ p(z).
    """
    args = as_args(batch)
    with evaluating(model), own_parameters(model, validate=False):
        trace = poutine.trace(poutine.uncondition(model)).get_trace(*args)
    return {
        name: site["fn"]
        for name, site in sample_sites(trace)
        if site["infer"].get("was_observed") and not isinstance(site["fn"], Unit)
    }


def reconstruct(model: Program, guide: Program, batch: Batch) -> dict[str, TorchDistribution]:
    """Draw latents from the guide and return the likelihood of every observed site.

    ``reconstruct(model, guide, x)["x"].mean`` is E[x' | z] with z ~ q(z | x). A site k that the model
    enumerates and the guide leaves out is drawn from p(k | x, z).

    Args:
        model: any model.
        guide: its guide.
        batch: their arguments.

    Returns:
        Site name -> p(x' | z), z ~ q(z | x).

    Raises:
        ValueError: if the batch does not fit.
    """
    args = as_args(batch)
    with evaluating(model, guide):
        found = _check(model, guide, args)
        model_trace, guide_trace = _traces(model, guide, args)
        if found.summed_out:
            z = {name: site["value"] for name, site in latent_sites(guide_trace).items()}
            drawn = infer_discrete(poutine.condition(model, data=z), -1 - found.nesting)
            with own_parameters(model, validate=False):
                model_trace = poutine.trace(drawn).get_trace(*args)
    observed = observed_sites(model_trace).items()
    return {name: site["fn"] for name, site in observed if name not in guide_trace}


def _chunks(batch: Batch, rows: int) -> Iterator[tuple[Any, ...]]:
    """Split a batch into batches of at most so many data."""
    args = as_args(batch)
    if not args or not isinstance(args[0], Tensor) or not args[0].dim() or not len(args[0]):
        raise ValueError(
            "Expected a batch of data, a tensor (N, ...) with N > 0 or a tuple that begins with one, "
            f"got {getattr(args[0], 'shape', args[0]) if args else 'an empty tuple'}."
        )
    total = len(args[0])
    for start in range(0, total, rows):
        yield tuple(
            arg[start : start + rows] if isinstance(arg, Tensor) and arg.dim() and len(arg) == total else arg
            for arg in args
        )


def _check(model: Program, guide: Program, args: tuple[Any, ...]) -> Layout:
    """Check the pair, and return its layout."""
    check_whole(model, guide, args)
    with own_parameters(model, guide, validate=False):
        return layout(model, guide, args, {}, particles=False)


def _traces(model: Program, guide: Program, args: tuple[Any, ...]) -> tuple[poutine.Trace, poutine.Trace]:
    with own_parameters(model, guide, validate=False):
        return traces(model, guide, args, {})


def _log_prob(trace: poutine.Trace, names: Iterable[str], particle_dim: int | None = None) -> Tensor:
    """Sum the unscaled, masked log probabilities of sites: (particles, N), one without their plate."""
    return per_datum(trace, dict.fromkeys(names, 1.0), particle_dim)


def _log_weights(
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    particle_dim: int | None = None,
    particles: int = 1,
) -> Tensor:
    """Return log p(x, z) - log q(z | x) with z ~ q(z | x): (particles, N)."""

    def side_by_side(program: Program) -> Program:
        if particle_dim is None:
            return program
        return pyro.plate("_particles", particles, dim=particle_dim)(program)

    p, q = (
        _log_prob(trace, dict(sample_sites(trace)), particle_dim)
        for trace in _traces(side_by_side(model), side_by_side(guide), args)
    )
    return p - q
