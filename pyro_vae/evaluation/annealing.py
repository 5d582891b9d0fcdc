r"""Annealed importance sampling: log p(x) by chains that go from the guide q(z | x) to the posterior.

If importance weights of the guide differ by many nats, a few draws decide the estimate. Chains approach the
posterior step by step instead, along :math:`\pi_\beta \propto q(z | x)^{1 - \beta} p(x, z)^\beta`.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple, cast

import torch
from pyro.distributions import Delta
from torch import Tensor
from torch.distributions import biject_to

from pyro_vae.arguments import check_tensor, given, require, whole_number
from pyro_vae.evaluation import weights
from pyro_vae.evaluation.checks import check_whole
from pyro_vae.evaluation.chunks import checked_chunks, chunks
from pyro_vae.evaluation.hamiltonian import Path, transition
from pyro_vae.evaluation.weights import log_mean
from pyro_vae.programs import Batch, Pair, Program, as_args
from pyro_vae.programs.faults import locate
from pyro_vae.programs.plates import find_layout
from pyro_vae.programs.traces import EvaluationError, Site, data_plate, family, innermost, latent_sites, twins
from pyro_vae.progress_bar import progress_bar
from pyro_vae.table import Table, table_of_means

# The pilot run: its chains, its target acceptance, its first step size in standard deviations of the guide,
# and how fast the log step size follows the acceptance.
PILOTS, ACCEPTANCE, FIRST_STEP, GAIN = 8, 0.65, 0.5, 0.5


class AnnealedEvidence(NamedTuple):
    """Bounds on log p(x) by annealed importance sampling. ``print`` and a notebook show their means.

    Attributes:
        values: the lower bound in nats, (N,).
        standard_error: its Monte Carlo standard error in nats, (N,), by the delta method; NaN with one
            chain. It measures the noise, not the gap to log p(x).
        effective_sample_size: (sum w)^2 / sum w^2 of the weights of the chains, from 1 to their number, (N,).
        acceptance: the mean acceptance rate of the transitions, (N,).
        upper: an upper bound in nats, (N,); None if the latents of simulated data were not given.
    """

    values: Tensor
    standard_error: Tensor
    effective_sample_size: Tensor
    acceptance: Tensor
    upper: Tensor | None

    def mean(self) -> Tensor:
        """Return the mean of the lower bound over the data, in nats for each data point."""
        return self.values.mean()

    def __str__(self) -> str:
        return str(self._table())

    def _repr_html_(self) -> str:
        return self._table()._repr_html_()

    def _table(self) -> Table:
        rows: dict[str, Tensor | str] = {"annealed lower bound on log p(x)": self.values}
        if self.upper is not None:
            rows["annealed upper bound on log p(x)"] = self.upper
        # The errors of the data are independent: each has its own chains.
        noise = float(self.standard_error.double().square().sum().sqrt()) / len(self.values)
        if not math.isnan(noise):
            rows["Monte Carlo error of the mean, lower bound"] = f"{noise:.3f}"
        return table_of_means(rows, self.values)


def annealed_evidence(
    model: Program,
    guide: Program,
    batch: Batch,
    num_chains: int = 16,
    num_steps: int = 100,
    *,
    latents: Mapping[str, Tensor] | None = None,
) -> AnnealedEvidence:
    r"""Estimate log p(x) of every data point by annealed importance sampling from the guide.

    A chain begins at :math:`z_0 \sim q(z | x)`. It takes a step of Hamiltonian Monte Carlo at each
    temperature :math:`0 = \beta_0 < \ldots < \beta_T = 1` except the two ends. Its weight is
    :math:`w = \prod_t (p(x, z_{t-1}) / q(z_{t-1} | x))^{\beta_t - \beta_{t-1}}`, with E w = p(x). So
    :math:`\log \frac{1}{K} \sum_k w_k` is a lower bound in expectation. It rises to log p(x) with the chains
    K, and much faster with the steps T. :func:`log_evidence` says what p(x, z) contains: enumerated sites are
    summed out, masks are kept, scales and factors are left out.

    The temperatures are the sigmoidal schedule of Grosse et al. A pilot run, whose chains do not count, finds
    a scale for every dimension of z. It also finds a step size for every data point and temperature, with an
    acceptance near 0.65. In the run that counts these are fixed, as they must be for a bound.

    With the latents of simulated data, one more chain runs backwards, from these latents to the guide. They
    are one exact draw of p(z | x), so this chain has the density of the others times w / p(x). Let w_0 be its
    weight. Then :math:`\log \frac{1}{K + 1} \sum_{k=0}^K w_k` exceeds log p(x) in expectation, by KL(b || f).
    Here f is K + 1 forward chains, and b is K + 1 chains of which any one runs backwards. This gap is about
    as large as that of the lower bound, and vanishes with K too. The gap with K backward chains,
    :math:`-\log \frac{1}{K} \sum_k 1 / w_k`, does not vanish: all would begin at the same draw.

    Chains run side by side if model and guide can take the extra dimension on the left. Otherwise they run
    one after the other. A chunk of data times chains bounds the memory. The time per data point is that of
    about ``5 * num_steps * (num_chains + 8)`` evaluations of p(x, z) with gradients.

    Args:
        model: a Pyro model with all sites inside the plate of the data. Its p(x, z) is differentiable.
        guide: a Pyro guide with the latent sites inside the plate of the data. They are continuous, and
            log q(z | x) can be evaluated at any z.
        batch: the data, a tensor ``(N, ...)`` or a tuple of the model's arguments.
        num_chains: K, the number of chains for each data point.
        num_steps: T, the number of steps from the guide to the posterior, at least 2.
        latents: site -> the draws from which this model simulated the batch, in the shape of the guide's
            draws, ``(N, ...)``. Other data have no such draws, and no upper bound.

    Returns:
        The bounds, in nats for each data point.

    Raises:
        ValueError: if num_chains or num_steps is too small, the batch does not fit, a latent site is
            discrete, a point or auxiliary, or its density cannot be evaluated, a site is outside the plate of
            the data or in a subsampled plate inside it, a factor may be a density, an autoguide holds the
            posteriors of other data, the latents do not fit, or a weight is not finite.

    References:
        Neal 2001, Annealed importance sampling (arXiv physics/9803008); Wu et al. 2017, arXiv 1611.04273;
        Grosse et al. 2015, arXiv 1511.02543 (the backward chain, the schedule); Brekelmans et al. 2022,
        arXiv 2303.06992 (one backward chain among forward ones).
    """
    num_chains = whole_number("num_chains", num_chains, 1, "pass 16, for example")
    num_steps = whole_number("num_steps", num_steps, 2, "pass 100, for example")
    betas, found, start = _sigmoidal_schedule(num_steps), [], 0
    pair = Pair(model, guide, as_args(batch))
    with torch.inference_mode(False), pair.evaluating():
        checked_chunks(pair, weights.rows_at_once(pair))
        head = next(chunks(pair, max(1, weights.rows_at_once(pair) // num_chains)))
        simulated = _check_latents(latents, _check_sites(head), len(pair.args[0]))
        rows = len(head.args[0])
        with head.isolated(validate=False):
            if find_layout(head, particles=True).particle_dim is None:
                rows = max(rows, weights.rows_at_once(pair))
        with progress_bar(total=len(pair.args[0]), desc="annealed data", delay=2) as bar:
            for chunk in chunks(pair, rows):
                size = len(chunk.args[0])
                part = {name: z.narrow(dim, start, size) for name, (z, dim) in simulated.items()}
                start += size
                before = chunk.snapshot()
                with chunk.isolated(validate=False):
                    run = _chains(chunk, betas, num_chains, part)
                if not run[0].amax(0).isfinite().all():
                    before.restore()
                    raise ValueError(locate(chunk, "The evidence is not finite"))
                found.append(run)
                bar.update(size)
    log_w, rate, backward = (torch.cat(parts, -1) for parts in zip(*found, strict=True))
    first, second = log_w.logsumexp(0), (2 * log_w).logsumexp(0)
    upper = None
    if latents is not None:
        upper = (torch.logaddexp(first, backward) - math.log(num_chains + 1)).to(rate.dtype)
    values, error = log_mean(first, second, num_chains)
    effective = (2 * first - second).exp()
    values, error, effective = (each.to(rate.dtype) for each in (values, error, effective))
    return AnnealedEvidence(values, error, effective, rate, upper)


def _sigmoidal_schedule(num_steps: int) -> list[float]:
    """Return temperatures from 0 to 1, dense at both ends (Grosse et al. 2015, section 5.1)."""
    s = torch.linspace(-4, 4, num_steps + 1, dtype=torch.float64).sigmoid()
    return ((s - s[0]) / (s[-1] - s[0])).tolist()


def _chains(
    pair: Pair, betas: Sequence[float], num_chains: int, latents: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Run all chains of a chunk: log w, (chains, N), mean acceptance and log w backwards, (N,)."""
    layout = find_layout(pair, particles=True)
    at_once = 1 if layout.particle_dim is None else max(1, weights.rows_at_once(pair) // len(pair.args[0]))

    def paths(count: int) -> list[Path]:
        return [Path(pair, layout, min(at_once, count - done)) for done in range(0, count, at_once)]

    tuning = _tune(paths(PILOTS), betas)
    runs = [_anneal(path, path.draw(), betas, tuning) for path in paths(num_chains)]
    log_w, rate = (torch.cat(parts) for parts in zip(*runs, strict=True))
    backward = log_w.new_zeros(log_w.shape[1])
    if latents:
        path = Path(pair, layout, 1)
        # Each transition is its own reversal: the same ones, in the opposite order.
        backward = _anneal(path, path.inverse(latents), betas[::-1], tuning)[0][0]
        require(
            bool(backward.isfinite().all()),
            "latents",
            "the draws that the batch was simulated with",
            "some where the density of the model or of the guide is 0 or no number",
            "pass the draws of the model's trace that observed the batch",
        )
    return log_w, rate.mean(0), backward


class _Tuning(NamedTuple):
    """The result of a pilot run: the scale of each dimension, (N, D), and step sizes, beta -> (N,)."""

    scale: Tensor
    steps: Mapping[float, Tensor]


def _anneal(path: Path, u: Tensor, betas: Sequence[float], tuning: _Tuning) -> tuple[Tensor, Tensor]:
    """Take chains at u from the first temperature to the last: log w and mean acceptance, (chains, N)."""
    point, rates = path.at(u), []
    log_w = torch.zeros_like(point.log_p, dtype=torch.float64)
    for beta, following in pairwise(betas):
        log_w += abs(following - beta) * (point.log_p - point.log_q).double()
        if following in tuning.steps:  # not at the last
            point, rate = transition(path, point, following, tuning.steps[following], tuning.scale)
            rates.append(rate)
    return log_w, torch.stack(rates).mean(0)


def _tune(paths: Sequence[Path], betas: Sequence[float]) -> _Tuning:
    """Find step sizes by chains along the temperatures: each follows the acceptance of the one before."""
    starts = [path.draw() for path in paths]
    scale = torch.cat(starts).std(0) * paths[0].moving()
    found: dict[float, list[Tensor]] = {beta: [] for beta in betas[1:-1]}
    for path, u in zip(paths, starts, strict=True):
        point, log_step = path.at(u), scale.new_full((len(scale),), math.log(FIRST_STEP))
        for beta in found:
            point, rate = transition(path, point, beta, log_step.exp(), scale)
            log_step = log_step + GAIN * (rate.mean(0) - ACCEPTANCE)
            found[beta].append(log_step)
    return _Tuning(scale, {beta: torch.stack(steps).mean(0).exp() for beta, steps in found.items()})


def _check_sites(pair: Pair) -> dict[str, tuple[Site, int]]:
    """Check a pair as for its evidence, and that chains can move its latents.

    Returns:
        The latents of the guide, and the dimension of the data in the values of each.
    """
    traces, plate = check_whole(pair)
    sites = latent_sites(traces.guide)
    if not sites:
        raise EvaluationError(
            "Latent sites: expected at least one in the guide, got none. To fix: use log_evidence, which "
            "is exact here."
        )
    found = {}
    for name, site in sites.items():
        data_dim = cast(int, data_plate(name, site, plate).dim)
        found[name] = site, len(site["fn"].batch_shape) + data_dim
        fn, fault = site["fn"], ""
        try:
            if site["infer"].get("is_auxiliary"):
                fault = "an auxiliary site, as autoguides draw"
            elif isinstance(innermost(fn), Delta):
                fault = "a point"
            elif twins(site["value"]) or fn.support.is_discrete:
                fault = "discrete values"
            elif "VonMises" in family(innermost(fn)):
                fault = "a density on a circle"
            else:
                biject_to(fn.support)
                fn.log_prob(site["value"].clone())  # a flow without an inverse knows only its own draws
        except (NotImplementedError, KeyError) as error:
            fault = f"an error ({error})"
        if fault:
            raise EvaluationError(
                f"Site '{name}' of the guide, {family(fn)}: expected a continuous latent with a support that "
                f"biject_to knows and log_prob at any value, since chains move it, got {fault}. To fix: use "
                "log_evidence, or a guide of such densities, such as pyro_vae.Guide with DiagNormal."
            )
    return found


def _check_latents(
    latents: object, sites: Mapping[str, tuple[Site, int]], num_data: int
) -> dict[str, tuple[Tensor, int]]:
    """Return the latents that the data were simulated with, and the dimension of the data in each."""
    if latents is None:
        return {}
    got = given(latents)
    if isinstance(latents, Mapping):
        got, latents = f"a dict of {list(latents)}", dict(latents)
    fits = isinstance(latents, dict) and latents.keys() == sites.keys()
    fix = f"pass latents={{{', '.join(f'{name!r}: ...' for name in sites)}}}, as the model drew them"
    require(fits, "latents", f"a dict of draws of the sites {list(sites)}", got, fix)
    found = {}
    for name, (site, dim) in sites.items():
        z, drawn = cast(dict[str, Tensor], latents)[name], site["value"]
        check_tensor(f"latents['{name}']", z)
        shape = (*drawn.shape[:dim], num_data, *drawn.shape[dim + 1 :])
        require(
            tuple(z.shape) == shape and z.is_floating_point(),
            f"latents['{name}']",
            f"floats of shape {shape}",
            f"{z.dtype} of shape {tuple(z.shape)}",
            "pass the draws with which the whole batch was simulated",
        )
        found[name] = z.detach().to(drawn), dim
    return found
