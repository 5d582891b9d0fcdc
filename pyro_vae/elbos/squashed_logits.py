"""Squashed logits: a sigmoid or a softmax right before a distribution that takes logits."""

import warnings
from typing import Any

import torch
from torch import Tensor

from pyro_vae.programs import Pair, Traces
from pyro_vae.programs.traces import Site, family, innermost, sample_sites

# Operations that change the form of a tensor, not its values: their names in autograd's graph.
_FORM = {"Alias", "Clone", "Expand", "Permute", "ReshapeAlias", "Select", "Slice", "Squeeze", "T", "ToCopy"}
_FORM |= {"Transpose", "UnsafeView", "Unsqueeze", "View"}


def warn_of_squashed_logits(pair: Pair, traces: Traces) -> None:
    """Warn where a sigmoid or a softmax computes the logits of a site, whose distribution applies its own.

    Run it in a trial, since it changes buffers and the random state.

    Args:
        pair: the pair on a batch.
        traces: the traces of one run of the pair.

    Warns:
        UserWarning: naming the site.
    """
    if not any(isinstance(_logits(site), Tensor) for trace in traces for _, site in sample_sites(trace)):
        return
    with torch.enable_grad():  # another run, since autograd's graph knows the operations
        guide_trace = pair.trace_guide()
        traces = Traces(pair.trace_model(guide_trace), guide_trace)
    for program, trace in zip(traces._fields, traces, strict=True):
        for name, site in sample_sites(trace):
            kind = family(innermost(site["fn"]))
            squash = _last_operation(_logits(site), kind).lower()
            if squash in ("sigmoid", "softmax"):
                warnings.warn(
                    f"Site '{name}' of the {program}, {kind}: expected logits, any real numbers, got the "
                    f"output of a {squash}, between 0 and 1, to which {kind} applies its own. To fix: leave "
                    f"the {squash} out.",
                    stacklevel=2,
                )


def _logits(site: Site) -> Any:
    return getattr(innermost(site["fn"]), "logits", None)


def _last_operation(logits: Any, kind: str) -> str:
    """Return which operation computed the values of logits: its name in autograd's graph."""
    node, name = getattr(logits, "grad_fn", None), ""
    if kind == "ContinuousBernoulli":
        node = _before_bend(node)
    while node is not None:
        name = _operation(node)
        first, second, *_ = (*(function for function, _ in node.next_functions), None, None)
        # The normalised logits of torch's Categorical.
        of_categorical = name == "Sub" and second is not None and _operation(second) == "Logsumexp"
        if not (name in _FORM or of_categorical):
            break
        node = first
    return name


def _before_bend(node: Any) -> Any:
    """Return the node before the bend of logits, where there is one.

    It is 16 r / (1 + r^8)^(1 / 8) of r = logits / 16, clamped.
    """
    before = node
    for operation in ("Div", "Mul", "Clamp", "Div"):
        while before is not None and _operation(before) in _FORM:
            before = before.next_functions[0][0]
        if before is None or _operation(before) != operation:
            return node
        before = before.next_functions[0][0]
    return before


def _operation(node: Any) -> str:
    name: str = node.name().rstrip("0123456789").removesuffix("Backward")
    return name
