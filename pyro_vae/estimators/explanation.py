"""Explanation: what an ELBO estimates at each site of a pair, how, why, and its value in nats."""

import copy
import warnings
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.infer import ELBO, Trace_ELBO
from pyro.infer.inspect import get_dependencies
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_vae.elbos.analytic_kl import analytic_kl, has_closed_form, is_registered, kl_faults
from pyro_vae.elbos.capabilities import AnalyticKL, Capabilities, capabilities, check_elbo, inner_elbo
from pyro_vae.elbos.checks import check_pair
from pyro_vae.elbos.importance import IWAE
from pyro_vae.programs import Pair, Program, Traces
from pyro_vae.programs.traces import Site, family, innermost, plate_size, sample_sites
from pyro_vae.table import Table


class Term(NamedTuple):
    """One site of a pair, and its term in the ELBO.

    Attributes:
        site: its name.
        role: "latent", "observed", or "auxiliary" for a latent that only the guide has.
        model: the family of p, "" where the model has no such site.
        guide: the family of q, "" where the guide has no such site.
        plates: the name and size of each plate, and the size of the set that it subsamples.
        batch_shape: the batch shape of the distribution.
        event_shape: the event shape of the distribution.
        scale: the scale of its log probability; a range if it is not a single number.
        mask: how many log probabilities count; "" without a mask.
        draw: "reparameterised", "score function" (a gradient by the score) or "enumerated"; "" if observed
            or summed out.
        estimate: "closed form", "Monte Carlo" or "exact sum".
        why: the reason, a sentence.
        nats: the term, unscaled and summed over the batch: the KL of a latent, E_q[log q] of an auxiliary,
            E_q[log p(x | z)] of an observed site. None if it is part of another site's term.
        share: what the term adds to the ELBO, with its sign and scale. None if it is part of another site's
            term.
    """

    site: str
    role: str
    model: str
    guide: str
    plates: str
    batch_shape: tuple[int, ...]
    event_shape: tuple[int, ...]
    scale: str
    mask: str
    draw: str
    estimate: str
    why: str
    nats: float | None
    share: float | None


class Explanation(NamedTuple):
    """What :func:`explain` returns: a table, both in print and in a notebook.

    ``[term._asdict() for term in explanation.terms]`` are its rows as plain records.

    Attributes:
        estimator: the name of the ELBO's class.
        particles: the number of draws over which the values are averaged.
        terms: one term for each site, in the model's order.
        elbo: the value of the estimator for these draws, in nats for the batch; the sum of all shares.
        note: why the shares do not add up to it, "" if they do.
    """

    estimator: str
    particles: int
    terms: tuple[Term, ...]
    elbo: float
    note: str

    def __str__(self) -> str:
        return str(self._table())

    def _repr_html_(self) -> str:
        return self._table()._repr_html_()

    def _table(self) -> Table:
        """Return a table with a row for each term and the total, without empty columns."""
        draws = "1 draw" if self.particles == 1 else f"{self.particles} draws"
        whys = [f"{term.site}: {term.why}" for term in self.terms]
        columns = {
            "site": [term.site for term in self.terms],
            "role": [term.role for term in self.terms],
            "model": [term.model for term in self.terms],
            "guide": [term.guide for term in self.terms],
            "plates": [term.plates for term in self.terms],
            "batch | event": [f"{_shape(t.batch_shape)} | {_shape(t.event_shape)}" for t in self.terms],
            "scale": [term.scale for term in self.terms],
            "mask": [term.mask for term in self.terms],
            "draw": [term.draw for term in self.terms],
            "estimate": [term.estimate for term in self.terms],
            "nats": [_number(term.nats) for term in self.terms],
            "in the ELBO": [_number(term.share) for term in self.terms],
        }
        total = {"site": "ELBO", "in the ELBO": _number(self.elbo)}
        filled = {
            name: [*cells, total.get(name, "")]
            for name, cells in columns.items()
            if any(cells) or name in ("nats", "in the ELBO")
        }
        return Table(
            f"{self.estimator}, {draws} of the guide; nats for the whole batch",
            [list(filled), *zip(*filled.values(), strict=True)],
            [*whys, *filter(None, [self.note])],
        )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _shape(shape: tuple[int, ...]) -> str:
    return ", ".join(map(str, shape)) or "-"


def explain(model: Program, guide: Program, elbo: ELBO, *args: Any, **kwargs: Any) -> Explanation:
    """Explain, site by site, what an ELBO estimates on a pair, how and why, with its value on a batch.

    The pair is checked first, as :class:`~pyro_vae.SVI` does. Parameters, buffers, the random state and
    Pyro's parameter store do not change. (An autoguide makes its parameters at its first use, which may be
    this one.) Modules keep their modes, so call ``eval()`` for a network with Dropout.

    Args:
        model: a Pyro model.
        guide: a Pyro guide of the model's latent sites.
        elbo: a Pyro ELBO.
        *args: a batch: the positional arguments of model and guide.
        **kwargs: keyword arguments of model and guide.

    Returns:
        One term for each site, and the ELBO.

    Raises:
        ValueError: if the pair, the batch and the ELBO do not fit, as from ``SVI.step``.

    References:
        Hoffman and Johnson 2016, ELBO surgery.
    """
    check_elbo("elbo", elbo)
    elbo = copy.copy(inner_elbo(elbo))  # a copy, since an ELBO notes the plates it sees
    pair = Pair(model, guide, args, kwargs)
    with pair.trial():
        check_pair(pair, elbo)
    pair = Pair(model, guide, args, kwargs)  # the check may have made parameters
    with pair.trial(), pair.isolated(validate=False):
        traces = pair.trace()
        faults = kl_faults(pair, traces)
        groups = _groups(pair, traces)

    def evaluate(estimator: Any, names: list[str] | None = None, scaled: bool = True) -> float:
        """Estimate the ELBO of some sites only, with the same noise every time."""
        only = _Only(names, scaled)
        with pair.trial(), pair.isolated(validate=False), warnings.catch_warnings(action="ignore"):
            return -float(estimator.loss(only(model), only(guide), *args, **kwargs))

    p, q = (dict(sample_sites(trace)) for trace in traces)
    value, note, estimator = evaluate(elbo), "", elbo
    shares = [evaluate(elbo, group) for group in groups]
    if abs(sum(shares) - value) > 1e-4 * max(map(abs, [*shares, value, 1.0])):
        # Trace_ELBO would draw a site that is summed out from its prior.
        sums_out = any(_summed_out(name, p, q) for name in p)
        estimator = IWAE(1) if sums_out else Trace_ELBO(num_particles=elbo.num_particles)
        of = "IWAE(1), of one draw" if sums_out else "Trace_ELBO"
        note = f"{type(elbo).__name__} is not a sum over sites: the terms are those of {of}."
        shares = [evaluate(estimator, group) for group in groups]
    plain_estimator = getattr(estimator, "without_free_nats", estimator)
    able = capabilities(elbo)
    terms = []
    for group, share in zip(groups, shares, strict=True):
        plain = evaluate(plain_estimator, group, scaled=False)
        for name in group:
            estimate, why = _how(name, group, p, q, type(elbo).__name__, able, faults)
            alone = name == group[0] and all(_summed_out(other, p, q) for other in group[1:])
            observed = name in p and p[name]["is_observed"]
            nats = plain if observed else -plain
            terms.append(
                _term(name, p, q, able)._replace(
                    estimate=estimate,
                    why=why,
                    nats=nats if alone else None,
                    share=share if name == group[0] else None,
                )
            )
    return Explanation(type(elbo).__name__, elbo.num_particles, tuple(terms), value, note)


class _Only(Messenger):
    """Keeps only the log probabilities of the named sites, with their scale or without."""

    def __init__(self, names: list[str] | None, scaled: bool) -> None:
        super().__init__()
        self.names, self.scaled = names, scaled

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            return
        if self.names is not None and msg["name"] not in self.names:
            msg["mask"] = False
        elif not self.scaled:
            msg["scale"] = 1.0


def _summed_out(name: str, p: dict[str, Site], q: dict[str, Site]) -> bool:
    return name not in q and not p[name]["is_observed"]


def _groups(pair: Pair, traces: Traces) -> list[list[str]]:
    """Group the sites into terms: one that is summed out of the model goes with what depends on it."""
    p, q = (dict(sample_sites(trace)) for trace in traces)
    groups = [[name] for name in p | q]
    summed = [name for name in p if _summed_out(name, p, q)]
    replayed = poutine.replay(pair.model, trace=traces.guide)
    parents: Any = get_dependencies(replayed, pair.args, pair.kwargs)["prior_dependencies"] if summed else {}
    for name in summed:
        near = {name, *(child for child in parents if name in parents[child])}
        joined = [member for group in groups if near & set(group) for member in group]
        joined.sort(key=lambda member: member in summed)
        groups = [group for group in groups if not near & set(group)] + [joined]
    return groups


def _how(
    name: str,
    group: list[str],
    p: dict[str, Site],
    q: dict[str, Site],
    elbo: str,
    able: Capabilities,
    faults: dict[str, str],
) -> tuple[str, str]:
    """Say how a site's term is estimated, and why."""
    if name in p and name in q and p[name]["is_observed"]:
        return "Monte Carlo", f"E_q[log p] at the guide's draws, and what {elbo} makes of log q"
    if name not in p and q[name]["is_observed"]:
        return "Monte Carlo", "a factor of the guide, at its draws"
    if name not in p:
        return "Monte Carlo", "E_q[log q] of a latent that only the guide has, at its draws"
    if len(group) > 1:
        sums = ", ".join(other for other in group if _summed_out(other, p, q))
        others = ", ".join(other for other in group if other != name and not _summed_out(other, p, q))
        if name != group[0]:
            return "exact sum", f"summed over {sums}, in the term of '{group[0]}'"
        return "exact sum", f"the logarithm of a sum over {sums}" + (f", with {others}" if others else "")
    if name not in q:
        if all(_enumerated(site, able) for site in q.values()):
            return "exact sum", "E_q[log p], over all values of the latents"
        return "Monte Carlo", "E_q[log p] at the guide's draws"
    if _enumerated(q[name], able):
        return "exact sum", "KL over all its values"
    if isinstance(innermost(q[name]["fn"]), Delta):
        return "Monte Carlo", "q is a point: the term is log q - log p there"
    kl = f"KL({family(q[name]['fn'])} || {family(p[name]['fn'])})"
    if not has_closed_form(q[name]["fn"], p[name]["fn"]):
        right = "no right" if is_registered(q[name]["fn"], p[name]["fn"]) else "no"
        return "Monte Carlo", f"{right} {kl} is registered"
    if able.analytic_kl is AnalyticKL.WHERE_RIGHT:
        latents = [{n: site for n, site in sites.items() if not site["is_observed"]} for sites in (p, q)]
        found = analytic_kl(name, *latents)
        return ("Monte Carlo", found) if isinstance(found, str) else ("closed form", f"{kl} is registered")
    if name in faults:
        return "Monte Carlo", f"{kl} is registered, but would be wrong: {faults[name]}"
    if able.analytic_kl is AnalyticKL.NEVER:
        return "Monte Carlo", f"{kl} is registered, but {elbo} uses no closed form"
    return "closed form", f"{kl} is registered"


def _enumerated(site: Site, able: Capabilities) -> bool:
    return able.enumerates_guide and bool(site["infer"].get("enumerate"))


def _term(name: str, p: dict[str, Site], q: dict[str, Site], able: Capabilities) -> Term:
    """Describe a site, without its estimate."""
    site: Any = p[name] if name in p else q[name]
    observed = bool(site["is_observed"])
    drawn: Any = q.get(name, site)
    if observed or _summed_out(name, p, q):
        draw = ""
    elif _enumerated(drawn, able):
        draw = "enumerated"
    else:
        draw = "reparameterised" if drawn["fn"].has_rsample else "score function"
    return Term(
        site=name,
        role="observed" if observed else "latent" if name in p else "auxiliary",
        model=family(p[name]["fn"]) if name in p else "",
        guide=family(q[name]["fn"]) if name in q else "",
        plates=", ".join(
            f"{frame.name} {plate_size(site, frame)}"
            + (f" of {frame.full_size}" if frame.full_size not in (None, frame.size) else "")
            for frame in site["cond_indep_stack"]
        ),
        batch_shape=tuple(site["fn"].batch_shape),
        event_shape=tuple(site["fn"].event_shape),
        scale=_range(site["scale"]),
        mask=_count(site["mask"], site["fn"].batch_shape),
        draw=draw,
        estimate="",
        why="",
        nats=None,
        share=None,
    )


def _range(scale: Any) -> str:
    low, high = torch.as_tensor(scale).aminmax()
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _count(mask: Any, batch_shape: torch.Size) -> str:
    if isinstance(mask, Tensor):
        mask = mask.expand(torch.broadcast_shapes(mask.shape, batch_shape))
        return f"{int(mask.sum())} of {mask.numel()}"
    return "none" if mask is False else ""
