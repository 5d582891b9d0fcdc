"""Dependencies: which site of a program depends on which."""

import re
from collections.abc import Set
from typing import Any

from pyro import poutine
from pyro.infer.inspect import get_dependencies
from pyro.ops.provenance import get_provenance
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_vae.programs.pair import Pair, Program, Traces, leaves
from pyro_vae.programs.traces import EvaluationError, latent_sites


class Dependencies:
    """The sites that each site of a program depends on.

    Run it in a trial, since it changes buffers and the random state.

    Args:
        program: a model or a guide.
        args: its positional arguments.
        kwargs: its keyword arguments.
        latents: the sites that must stay tracked.

    Attributes:
        parents: site -> the sites that it depends on directly.
    """

    def __init__(
        self, program: Program, args: tuple[Any, ...], kwargs: dict[str, Any], latents: Set[str]
    ) -> None:
        self.parents: dict[str, set[str]] = {}
        with _LostTrack(latents) as lost:
            try:
                found: Any = get_dependencies(program, args, kwargs)["prior_dependencies"]
                self.parents = {name: set(parents) - {name} for name, parents in found.items()}
            except Exception as error:  # a program may say anything about tracked tensors
                lost.by = f"an error ({error})"
        self._lost_by = lost.by

    def doubt(self, name: str) -> str:
        """Return what may hide the dependencies of a site, "" if they are known."""
        # Pyro leaves out a point, pyro.sample(name, Delta(...)).
        return self._lost_by or ("" if name in self.parents else f"the point '{name}'")

    def ancestors(self, name: str) -> set[str]:
        """Return the sites that a site depends on, also indirectly."""
        found: set[str] = set()
        todo = [name]
        while todo:
            new = self.parents.get(todo.pop(), set()) - found
            found |= new
            todo += new
        return found


def check_alone(pair: Pair, traces: Traces, *, model: bool) -> None:
    """Refuse a guide, and a model if asked, in which the distribution of a latent depends on other latents.

    Buffers and random state stay as they were.

    Args:
        pair: the pair on a batch.
        traces: the traces of one run of the pair.
        model: whether to check the model, too.

    Raises:
        EvaluationError: naming the site and what it depends on.
    """
    latents = set(latent_sites(traces.guide))
    if len(latents) < 2:
        return
    programs = {"guide": pair.guide}
    if model:
        programs["model"] = poutine.replay(pair.model, trace=traces.guide)
    for side, program in programs.items():
        with pair.trial(), pair.isolated(validate=False):
            found = Dependencies(program, pair.args, pair.kwargs, latents)
        for name in sorted(latents):
            parents, doubt = found.ancestors(name) & latents, found.doubt(name)
            if parents or doubt:
                on = " and ".join(f"'{parent}'" for parent in sorted(parents)) or f"what {doubt} hides"
                raise EvaluationError(
                    f"Site '{name}' of the {side}: expected a distribution that depends on no other latent, "
                    f"got one that depends on {on}. To fix: use latents that are independent "
                    f"{'given x' if side == 'guide' else 'a priori'}."
                )


class _LostTrack(TorchFunctionMode):
    """Notes an operation at which ``get_dependencies`` loses track of a latent.

    ``get_dependencies`` follows the results of operations. So it misses a write into another tensor, a value
    that is read into Python, and operations inside torch.vmap.
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
        given = [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        # Inside torch.vmap a tensor prints as BatchedTensor(lvl=1, ...).
        if any("Tensor(lvl=" in repr(tensor) for tensor in given):
            self.by = "torch.vmap"
        used = get_provenance(given) & self._latents
        written = args[0] if WRITES.fullmatch(name) else (kwargs or {}).get("out")
        kept = result if written is None else written
        has_tensor = any(isinstance(leaf, Tensor) for leaf in leaves(result))
        if used - get_provenance(kept) and (written is not None or name in _READS or has_tensor):
            self.by = f"the operation {name}"
        return result


# Operations that write into their first argument: add_, b[:] = z, b.data = z, b += z.
WRITES = re.compile(r"[a-z]\w*_|__set(item)?__|__i[a-z]+__")
_READS = {"item", "tolist", "numpy", "is_nonzero", "equal", "allclose"} | {
    f"__{name}__" for name in ("array", "bool", "int", "float", "index")
}
