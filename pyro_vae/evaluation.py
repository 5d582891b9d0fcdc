"""Evaluation: evidence, the ELBO's terms, what latents carry, generation, reconstruction, from traces alone.

Nothing here knows a model's insides: it needs a plate "data" around every site, and works as well
on several latent sites and on models written elsewhere. A discrete site of the model that is marked
``infer={"enumerate": "parallel"}`` and absent from the guide is summed out exactly. All of it runs in
eval mode and without gradients, and moves nothing but the random state. A batch is what model and guide
take: a tensor, or a tuple of arguments whose tensors of the first one's length are per datum.
"""

import functools
import math
import warnings
from collections.abc import Iterable, Iterator
from numbers import Integral
from typing import Any, NamedTuple, cast

import pyro
import torch
from pyro import poutine
from pyro.distributions import Unit
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.distributions.util import scale_and_mask
from pyro.infer import infer_discrete
from torch import Tensor
from torch.distributions import Independent

from pyro_vae.diagnostics import check_pair, locate
from pyro_vae.graphs import Graph
from pyro_vae.layouts import Layout, layout
from pyro_vae.pairs import Batch, Before, Program, as_args, evaluating, own_parameters, rehearsal
from pyro_vae.traces import Site, data_plate, latent_sites, observed_sites, per_datum, sample_sites, traces

# Data times samples in one pass. Large enough that the handlers' cost vanishes beside the matrix
# products, small enough for their results to stay near the cache.
_ROWS = 4096

# A dimension is active if its posterior mean varies more than this over the data (Burda et al. 2015).
_ACTIVE = 0.01
# A site of less is collapsed, in nats a datum.
_COLLAPSED = 0.1


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


class LatentTerms(NamedTuple):
    """What one latent site carries.

    Attributes:
        kl: E_q[log q(z | .) - log p(z | .)] of every datum, in nats, (N,). Over the sites it sums to
            the KL of the ELBO.
        kl_per_dimension: its parts, the mean over the data, in nats, (D,); None where q or p is no
            product over dimensions (a full covariance, a flow, a mixture).
        spread: Var_x(E_q[z]), the variance over the data of each dimension's posterior mean, (D,).
        active: whether spread is above 0.01, (D,).
    """

    kl: Tensor
    kl_per_dimension: Tensor | None
    spread: Tensor
    active: Tensor


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
            seconds that pay where there are many data and samples. What is left over of whole chunks runs
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
    at_once = min(num_samples, math.isqrt(_ROWS))
    chunks: list[tuple[Tensor, ...]] = []
    dtype = torch.get_default_dtype()
    graphs: dict[tuple[int, int], Graph] = {}
    with evaluating(model, guide):
        particle_dims: dict[int, int | None] = {}
        for args in _chunks(batch, _ROWS // at_once):
            if not chunks:
                summed = _check(model, guide, args).enumerated(model)
            size = len(args[0])
            if size not in particle_dims:
                with own_parameters(model, guide, validate=False):
                    particle_dims[size] = layout(model, guide, args, {}, particles=True).particle_dim
            dim = particle_dims[size]
            step = at_once if dim else 1
            before = Before(model, guide)
            # log sum w and log sum w^2, merged draw by draw.
            first = second = args[0].new_full((size,), -math.inf, dtype=torch.float64)
            for done in range(0, num_samples, step):
                count = min(step, num_samples - done)
                weigh = graphs.get((size, count)) or functools.partial(
                    _log_weights, summed, guide, particle_dim=dim, particles=count
                )
                if compiled and not graphs:
                    weigh = graphs[size, count] = Graph(weigh, (summed, guide), (args,), {}).compile()
                log_w = weigh(args)
                dtype, log_w = log_w.dtype, log_w.double()
                first = torch.logaddexp(first, log_w.logsumexp(0))
                second = torch.logaddexp(second, (2 * log_w).logsumexp(0))
            if not first.isfinite().all():
                before.restore()
                raise ValueError(locate(model, guide, args, {}, "The evidence is not finite"))
            chunks.append((first, second))
    first, second = (torch.cat(parts) for parts in zip(*chunks, strict=True))
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


def latent_terms(
    model: Program, guide: Program, batch: Batch, num_samples: int = 100
) -> dict[str, LatentTerms]:
    r"""Say what every latent site carries: its KL, by dimension too, and its active units.

    All of it by Monte Carlo, so it holds for any pair: with a closed form or without, and whichever
    way the guide conditions one site upon another. The estimate of the spread is unbiased: from the
    variance of a datum's mean draw over the data, the part that is noise is taken off. A thousand data
    with a hundred draws each give it within a few thousandths. Scales are left out, masks are kept.

    It warns of posterior collapse: of a site where no dimension is active or the mean KL is below 0.1
    nats. Such a site says nothing of x beyond its prior; lower the KL's weight at the beginning of
    training, weaken the decoder or drop the site.

    Args:
        model: makes Pyro statements, all latent sites inside a plate "data".
        guide: likewise.
        batch: the data, a tensor ``(N, ...)`` or a tuple of the model's arguments, N at least 2.
        num_samples: draws a datum, at least 2.

    Returns:
        Site name -> its terms.

    Raises:
        ValueError: if there are too few data or samples, the batch does not fit, a latent site stands
            outside the plate "data" or the guide lacks one.

    References:
        Burda et al. 2015, section 5.2, arXiv 1509.00519 (active units).
    """
    args = as_args(batch)
    if num_samples < 2:
        raise ValueError(f"num_samples expects two draws a datum or more, got {num_samples}.")
    sums: dict[str, _Sums] = {}
    with evaluating(model, guide):
        _check(model, guide, args)
        for _ in range(num_samples):
            model_trace, guide_trace = _traces(model, guide, args)
            in_guide = latent_sites(guide_trace)
            for name, p in latent_sites(model_trace).items():
                if name not in in_guide:
                    raise ValueError(
                        f"The guide does not sample '{name}', which the model sums out. Expected a posterior "
                        "of every latent site: give the guide one."
                    )
                sums.setdefault(name, _Sums()).add(name, p, in_guide[name])
    found = {name: total.terms(num_samples) for name, total in sums.items()}
    for name, terms in found.items():
        count, kl = int(terms.active.sum()), float(terms.kl.mean())
        if not count or kl < _COLLAPSED:
            warnings.warn(
                f"Posterior collapse at site '{name}': {count} of its {len(terms.active)} dimensions are "
                f"active and its KL is {kl:.3f} nats a datum.",
                stacklevel=2,
            )
    return found


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
    with rehearsal(model, guide):
        check_pair(model, guide, args, {})
        model_trace, _ = _traces(model, guide, args)
    sizes = {data_plate(name, site).size for name, site in sample_sites(model_trace)}
    if sizes - {len(args[0])}:
        raise ValueError(
            f"The plate 'data' draws {sorted(sizes)[0]} of the {len(args[0])} data given. Expected all of "
            "them for evaluation: draw the subsample outside, and give the plate subsample_size=len(x)."
        )
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


class _Sums:
    """Sums over the draws of a site, in float64."""

    def __init__(self) -> None:
        self.kl: Any = 0.0
        self.per_dimension: Any = 0.0
        self.z: Any = 0.0
        self.squares: Any = 0.0

    def add(self, name: str, p: Site, q: Site) -> None:
        self.kl = self.kl + (_terms(name, q) - _terms(name, p)).sum(-1)
        if _is_product(q["fn"]) and _is_product(p["fn"]):
            difference = _parts(name, q) - _parts(name, p)
            self.per_dimension = self.per_dimension + difference.mean(0)
        else:
            self.per_dimension = None
        z = _rows(name, q, q["value"], q["fn"].event_dim)
        self.z, self.squares = self.z + z, self.squares + z**2

    def terms(self, draws: int) -> LatentTerms:
        if len(self.kl) < 2:
            raise ValueError(f"The batch expects two data or more, got {len(self.kl)}.")
        mean = self.z / draws
        noise = (self.squares - draws * mean**2) / (draws - 1)  # Var(z | x)
        spread = mean.var(0) - noise.mean(0) / draws
        parts = None if self.per_dimension is None else self.per_dimension / draws
        return LatentTerms(self.kl / draws, parts, spread, spread > _ACTIVE)


def _is_product(fn: Any) -> bool:
    return isinstance(fn, Independent) or not fn.event_dim


def _terms(name: str, site: Site) -> Tensor:
    """The masked log probability of a site: (N, the rest)."""
    return _rows(name, site, scale_and_mask(site["unscaled_log_prob"], mask=site["mask"]))


def _parts(name: str, site: Site) -> Tensor:
    """The masked log probability of every dimension of a site that is a product over them: (N, D)."""
    fn, mask, event_dim = site["fn"], site["mask"], site["fn"].event_dim
    if isinstance(mask, Tensor):
        mask = mask.reshape(mask.shape + (1,) * event_dim)
    each = fn.base_dist if event_dim else fn
    return _rows(name, site, scale_and_mask(each.log_prob(site["value"]), mask=mask), event_dim)


def _rows(name: str, site: Site, values: Tensor, event_dim: int = 0) -> Tensor:
    """A row a datum: (N, the rest)."""
    rows = values.double().movedim(cast(int, data_plate(name, site).dim) - event_dim, 0)
    return rows.reshape(len(rows), -1)
