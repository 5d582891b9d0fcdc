"""Traces: the sites of a run."""

from collections.abc import Iterator
from typing import Any, cast

from pyro import poutine
from pyro.distributions import Unit
from pyro.poutine.util import site_is_subsample

Site = Any  # a node of a trace: Pyro's Message


def sample_sites(trace: poutine.Trace) -> Iterator[tuple[str, Site]]:
    """Yield the sample sites of a trace, without plates and deterministic sites."""
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or site_is_subsample(site):
            continue
        if not cast(dict[str, Any], site["infer"]).get("_deterministic"):
            yield name, site


def observed_sites(trace: poutine.Trace) -> dict[str, Site]:
    """Return the observed sites of a trace, without factors."""
    return {
        name: site
        for name, site in sample_sites(trace)
        if site["is_observed"] and not isinstance(innermost(site["fn"]), Unit)
    }


def latent_sites(trace: poutine.Trace) -> dict[str, Site]:
    """Return the sites of a trace that are sampled, not observed."""
    return {name: site for name, site in sample_sites(trace) if not site["is_observed"]}


def innermost(fn: Any) -> Any:
    """Return the distribution inside Independent, masked and expanded ones."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn
