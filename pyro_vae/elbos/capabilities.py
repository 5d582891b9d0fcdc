"""Capabilities: what each ELBO can do with a pair. SVI, the checks and explain read this one table."""

from enum import Enum
from typing import Any, NamedTuple, cast

from pyro.contrib.cevae import TraceCausalEffect_ELBO
from pyro.infer import (
    ELBO,
    JitTrace_ELBO,
    JitTraceEnum_ELBO,
    JitTraceGraph_ELBO,
    JitTraceMeanField_ELBO,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_MMD,
    TraceEnum_ELBO,
    TraceMeanField_ELBO,
    TraceTailAdaptive_ELBO,
    TraceTMC_ELBO,
)


class AnalyticKL(Enum):
    """Where an ELBO takes the KL of a latent site in closed form, if one is registered."""

    NEVER = "never"
    ALWAYS = "always, even where it is not the KL of the pair"
    WHERE_RIGHT = "where it is the KL of the pair, by the order of the sites"


class Capabilities(NamedTuple):
    """What an ELBO can do. The defaults are those of ``Trace_ELBO``.

    Attributes:
        refusal: why SVI refuses the ELBO, and what to use; "" if it does not.
        sums_out: whether it sums out a site that the model enumerates and the guide lacks.
        enumerates_guide: whether it also sums over enumerated sites of the guide.
        needs_rsample: whether every draw of the guide has to be reparameterised.
        analytic_kl: where it takes a KL in closed form.
        accepts_scales: whether sites may be scaled. If not, it would put the scale inside a logarithm.
        weighs_each_data_point: whether each data point has separate importance weights, whatever its plates.
        observes_guide: whether it has rules for a site that model and guide both observe.
        checks_particles: whether the ELBO itself tests if a pair can take particles side by side.
    """

    refusal: str = ""
    sums_out: bool = False
    enumerates_guide: bool = False
    needs_rsample: bool = False
    analytic_kl: AnalyticKL = AnalyticKL.NEVER
    accepts_scales: bool = True
    weighs_each_data_point: bool = True
    observes_guide: bool = False
    checks_particles: bool = False


_JIT = "its gradients can be twice too large, and it keeps its first model. To fix: use the ELBO without Jit."
_MANY_LOSSES = "its loss is not one number. To fix: use Trace_ELBO()."

# Pyro's ELBOs that differ from Trace_ELBO. A subclass has the entry of its nearest base class here.
_PYRO = {
    TraceMeanField_ELBO: Capabilities(needs_rsample=True, analytic_kl=AnalyticKL.ALWAYS),
    TraceEnum_ELBO: Capabilities(sums_out=True, enumerates_guide=True),
    # A site that only the model has would count twice, unless it is enumerated by samples.
    TraceTMC_ELBO: Capabilities(enumerates_guide=True, needs_rsample=True, accepts_scales=False),
    Trace_MMD: Capabilities(needs_rsample=True),
    # It maximises log q of such a site, which trains a predictor of the guide.
    TraceCausalEffect_ELBO: Capabilities(observes_guide=True),
    # Its gradient lacks the bound times the score of a draw without rsample.
    RenyiELBO: Capabilities(needs_rsample=True, accepts_scales=False, weighs_each_data_point=False),
    JitTrace_ELBO: Capabilities(refusal=_JIT),
    JitTraceGraph_ELBO: Capabilities(refusal=_JIT),
    JitTraceEnum_ELBO: Capabilities(refusal=_JIT),
    JitTraceMeanField_ELBO: Capabilities(refusal=_JIT),
    ReweightedWakeSleep: Capabilities(refusal=_MANY_LOSSES),
    TraceTailAdaptive_ELBO: Capabilities(refusal=_MANY_LOSSES),
}


def capabilities(elbo: ELBO) -> Capabilities:
    """Return what an ELBO can do: its class's ``capabilities``, else the entry in the table for Pyro."""
    for kind in type(elbo).__mro__:
        if "capabilities" in vars(kind):
            return cast(Capabilities, vars(kind)["capabilities"])
        if kind in _PYRO:
            return _PYRO[cast(Any, kind)]
    return Capabilities()


def inner_elbo(loss: Any) -> Any:
    """Return the ELBO inside a CompiledELBO, or the loss itself."""
    return getattr(loss, "elbo", loss)


def check_elbo(subject: str, elbo: Any) -> None:
    """Refuse an objective that is not a Pyro ELBO, or that a step cannot use.

    Raises:
        ValueError: with the reason.
    """
    name = elbo if isinstance(elbo, type) else type(elbo).__name__
    if not isinstance(elbo, ELBO):
        is_class = isinstance(elbo, type) and issubclass(elbo, ELBO)
        fix = f"make an object, {elbo.__name__}()" if is_class else "use Trace_ELBO(), for example"
        raise ValueError(
            f"{subject}: expected a Pyro ELBO whose loss is one number, got {name}. To fix: {fix}."
        )
    if refusal := capabilities(inner_elbo(elbo)).refusal:
        raise ValueError(f"{subject}: expected a Pyro ELBO whose loss is one number, got {name}: {refusal}")
