"""Analytic KL: where a KL in closed form is the KL of the pair. There are two rules, for two uses.

*By order*, for a step: :func:`analytic_kl`. This rule is sufficient and costs nothing, since it reads two
traces. Where it fails, the ELBO takes the KL by Monte Carlo, which is always right.

*By dependency*, for a refusal: :func:`kl_faults`. This rule is exact, and runs both programs with tracked
tensors. So a pair with an unusual order is not refused where its closed form is right.
"""

from collections.abc import Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Delta
from torch import Tensor
from torch.distributions import Distribution, HalfCauchy, HalfNormal, kl_divergence

from pyro_vae.programs import Pair, Traces
from pyro_vae.programs.dependencies import Dependencies
from pyro_vae.programs.traces import Site, family, innermost, latent_sites


def has_closed_form(q: Distribution, p: Distribution) -> bool:
    """Return whether KL(q || p) is registered for the families of two distributions, and is right."""
    return is_registered(q, p) and not folds(q, p)


def is_registered(q: Distribution, p: Distribution) -> bool:
    """Return whether torch has a KL(q || p) for the families of two distributions."""
    try:
        with torch.no_grad():
            kl_divergence(q, p)
    except NotImplementedError:
        return False
    return True


def folds(*distributions: Distribution) -> bool:
    """Return whether one maps several values of its base to one, so that torch's KL is that of the bases.

    For torch's half distributions, that is the same number.
    """

    def one_folds(fn: Any) -> bool:
        if isinstance(fn, HalfNormal | HalfCauchy) or not hasattr(fn, "base_dist"):
            return False
        return any(not each.bijective for each in getattr(fn, "transforms", ())) or one_folds(fn.base_dist)

    return any(map(one_folds, distributions))


def analytic_kl(name: str, p: dict[str, Site], q: dict[str, Site]) -> Tensor | str:
    """Return KL(q || p) of a latent site given its drawn parents, or say why only Monte Carlo is right.

    The closed form takes the expectation over the site alone. It holds everything fixed that p is conditioned
    on. So the guide has to draw all of that before the site. Otherwise it may depend on the draw.

    Args:
        name: the name of a latent site of model and guide.
        p: the latent sites of the model, on the draws of the guide, in their order.
        q: the latent sites of the guide, in their order.

    Returns:
        The KL in nats, of the site's batch shape, unscaled and without a mask; or the reason, as the end of a
        sentence: "Monte Carlo, because ...".
    """
    before_in_model, before_in_guide = (list(sites)[: list(sites).index(name)] for sites in (p, q))
    late = [parent for parent in before_in_model if parent not in before_in_guide]
    if late:
        return f"the model draws {', '.join(late)} before {name}, and the guide after it"
    if isinstance(innermost(q[name]["fn"]), Delta):
        return "q is a point, and the closed form leaves out its density"
    if folds(q[name]["fn"], p[name]["fn"]):
        return "the closed form is that of the distribution before it is folded"
    try:
        kl = kl_divergence(q[name]["fn"], p[name]["fn"])
    except NotImplementedError:
        families = (family(innermost(site["fn"])) for site in (q[name], p[name]))
        return "no closed form is registered for {} and {}".format(*families)
    return kl.expand(q[name]["fn"].batch_shape)


def kl_faults(pair: Pair, traces: Traces) -> dict[str, str]:
    """Name the latent sites at which a closed form would not be the KL of the pair, and say why.

    A point is never one of them: if q is a Delta, there is no integral. Run it in a trial, since it changes
    buffers and the random state.

    Args:
        pair: the pair on a batch.
        traces: the traces of one run of the pair.

    Returns:
        Site -> why not, a clause. Sites where the closed form is right are left out.
    """
    in_model, in_guide = latent_sites(traces.model), latent_sites(traces.guide)
    replayed = pair.wrapped(model=poutine.replay(pair.model, trace=traces.guide))
    faults = kl_conflicts(
        replayed,
        [name for name in in_model if name in in_guide],
        [name for name in in_guide if name in in_model],
    )
    return {
        name: why for name, why in faults.items() if not isinstance(innermost(in_guide[name]["fn"]), Delta)
    }


def kl_conflicts(pair: Pair, in_model: Sequence[str], in_guide: Sequence[str]) -> dict[str, str]:
    """Name the latents whose KL(q || p) at drawn values of the others is not that of the pair, and say why.

    The closed form is right if the parents of the latent in the model are not its descendants in the guide.
    This always holds if the guide draws in the model's order. Otherwise the dependencies of both decide.
    Hidden dependencies count as a conflict. Run it in a trial, since it changes buffers and the random state.

    Args:
        pair: the pair on a batch, its model on the draws of the guide.
        in_model: the latents of both, in the order in which the model draws them.
        in_guide: the same latents, in the order in which the guide draws them.

    Returns:
        Latent -> why not, a clause. Latents where it is right are left out.
    """
    suspects = {
        name: set(in_model[: in_model.index(name)]) & set(in_guide[in_guide.index(name) :])
        for name in in_model
    }
    if not any(suspects.values()):
        return {}
    p, q = (
        Dependencies(program, pair.args, pair.kwargs, set(in_model)) for program in (pair.model, pair.guide)
    )
    conflicts = {}
    for name, others in suspects.items():
        for other in sorted(others):
            doubt = p.doubt(name) or q.doubt(other)
            if doubt:
                conflicts[name] = (
                    f"the model draws '{other}' before '{name}' and the guide after it, and {doubt} hides "
                    "whether they depend on each other"
                )
            elif other in p.parents[name] and name in q.ancestors(other):
                conflicts[name] = (
                    f"'{name}' depends on '{other}' in the model, and '{other}' on '{name}' in the guide"
                )
    return conflicts
