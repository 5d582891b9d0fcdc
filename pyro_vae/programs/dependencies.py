"""Dependencies: who depends on whom in a model and in its guide, and where an analytic KL is right."""

import re
from collections.abc import Sequence, Set
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.infer.inspect import get_dependencies
from pyro.ops.provenance import get_provenance
from torch import _C, Tensor
from torch.distributions import kl_divergence
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from pyro_vae.programs.pair import Program
from pyro_vae.programs.traces import innermost, latent_sites


def has_closed_form(q: Any, p: Any) -> bool:
    """Say whether KL(q || p) is registered for the families of two distributions."""
    try:
        with torch.no_grad():
            kl_divergence(q, p)
    except NotImplementedError:
        return False
    return True


def kl_faults(
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    model_trace: poutine.Trace,
    guide_trace: poutine.Trace,
) -> dict[str, str]:
    """Name the latent sites at which an analytic KL would be wrong, and say why: a clause for each.

    A point is none of them: where q is a Delta there is no integral to be done.
    """
    in_model, in_guide = latent_sites(model_trace), latent_sites(guide_trace)
    replayed = poutine.replay(model, trace=guide_trace)
    faults = kl_conflicts(
        replayed,
        guide,
        args,
        kwargs,
        [name for name in in_model if name in in_guide],
        [name for name in in_guide if name in in_model],
    )
    return {
        name: why for name, why in faults.items() if not isinstance(innermost(in_guide[name]["fn"]), Delta)
    }


def kl_conflicts(
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    in_model: Sequence[str],
    in_guide: Sequence[str],
) -> dict[str, str]:
    """Name the latents whose KL(q || p) at drawn values of the others is not the pair's, and say why.

    It is, where the parents of the latent in the model are not its descendants in the guide. That is so
    wherever the guide draws in the model's order. Elsewhere the dependencies of both decide, and what
    hides them is a conflict. Run it in a rehearsal: it moves buffers and the random state.

    Args:
        model: makes Pyro statements, with the latents of a run of the guide.
        guide: makes Pyro statements.
        args: a batch, as both take it.
        kwargs: likewise.
        in_model: the latents of both in the order in which the model draws them.
        in_guide: likewise the guide.

    Returns:
        Latent -> why not, a clause. Nothing for those where it is right.
    """
    suspects = {
        name: set(in_model[: in_model.index(name)]) & set(in_guide[in_guide.index(name) :])
        for name in in_model
    }
    if not any(suspects.values()):
        return {}
    p, q = (_Dependencies(program, args, kwargs, set(in_model)) for program in (model, guide))
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


class _Dependencies:
    """The sites that each site of a program depends on."""

    def __init__(
        self, program: Program, args: tuple[Any, ...], kwargs: dict[str, Any], latents: Set[str]
    ) -> None:
        self.parents: dict[str, set[str]] = {}
        with _Hidden(latents) as hidden:
            try:
                found: Any = get_dependencies(program, args, kwargs)["prior_dependencies"]
                self.parents = {name: set(parents) - {name} for name, parents in found.items()}
            except Exception as error:  # whatever a program says of tracked tensors
                hidden.by = f"an error ({error})"
        self._hidden_by = hidden.by

    def doubt(self, name: str) -> str:
        """Say what may hide a site's dependencies, nothing where they are known."""
        # Pyro leaves a point, pyro.sample(name, Delta(...)), out.
        return self._hidden_by or ("" if name in self.parents else f"the point '{name}'")

    def ancestors(self, name: str) -> set[str]:
        """Return the sites that a site depends on, through others too."""
        found: set[str] = set()
        todo = [name]
        while todo:
            new = self.parents.get(todo.pop(), set()) - found
            found |= new
            todo += new
        return found


class _Hidden(TorchFunctionMode):
    """Notes an operation at which ``get_dependencies`` loses a latent.

    It follows the results of operations. So it misses a write into another tensor, a value that leaves
    for Python, and what happens inside torch.vmap.
    """

    def __init__(self, latents: Set[str]) -> None:
        super().__init__()
        self.by = ""
        self._latents = latents

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name: str = getattr(func, "__name__", "")
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(_C._functorch.is_functorch_wrapped_tensor(tensor) for tensor in given):
            self.by = "torch.vmap"
        used = get_provenance(given) & self._latents
        written = args[0] if _WRITES.fullmatch(name) else (kwargs or {}).get("out")
        kept = result if written is None else written
        if used - get_provenance(kept) and (written is not None or name in _LEAVES or _has_tensor(result)):
            self.by = f"the operation {name}"
        return result


_WRITES = re.compile(r"[a-z]\w*_|__set(item)?__|__i[a-z]+__")  # add_, b[:] = z, b.data = z, b += z
_LEAVES = {"item", "tolist", "numpy", "is_nonzero", "equal", "allclose"} | {
    f"__{name}__" for name in ("array", "bool", "int", "float", "index")
}


def _has_tensor(result: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in tree_leaves(result))
