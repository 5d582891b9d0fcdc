"""CompiledELBO: any model, guide and ELBO captured once as a graph of tensor operations, and compiled.

Pyro's handlers run in Python at every step, and a compiler that follows the Python stops at each of
them. What they compute for a pair of static structure is however always the same tensor operations:
so one run of the loss and its gradients is recorded below the handlers (``make_fx``), the parameters
and buffers become the graph's inputs, and from then on a step is one call of the compiled graph.
"""

import warnings
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.poutine.runtime import _PYRO_STACK, am_i_wrapped
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor

from pyro_vae.compiled.cpu.matrix_products import float32_products_use_bfloat16
from pyro_vae.compiled.graph import Graph, quiet
from pyro_vae.elbos.kl_weight import KLWeight
from pyro_vae.programs.observations import check_finite, sum_is_finite
from pyro_vae.programs.pair import Before, Inside, Program, parameters, signature, with_statements

# So many uses of another signature than the first are worth compiling it.
_OFTEN = 20

# With so many graphs, something is probably new at every step.
_MANY = 50


class CompiledELBO(ELBO):
    """An ELBO whose loss and gradients run as one compiled graph: what ``Jit*_ELBO`` were for.

    ::

        svi = SVI(model, guide, optim, loss=CompiledELBO(TraceMeanField_ELBO()))

    A drop-in for the ELBO inside, under this package's SVI and Pyro's. The first step of each signature is
    captured. The first of all is compiled at once, which takes some seconds; the operations of another
    signature are replayed one by one until it has come twenty times. A signature is the shapes, dtypes and
    devices of all tensors in the arguments, the values of the other arguments, which modules and trainable
    parameters there are, their dtypes and how they lie in memory, each module's train or eval mode, autocast
    and the precision of float32 products; so a smaller last batch has a graph of its own. Parameters, buffers
    and tensors that the pair closes over are read at every step, and random operations draw anew. What
    changes from step to step as a *Python* number cannot be seen: pass it as a tensor.

    Pair and ELBO must have static structure: the same sites and operations at every step. What reads
    a tensor into Python (``if z.sum() > 0``) is refused when it is captured. Every capture is held
    against a second, eager run with the same noise, which finds what changes between two runs.

    Args:
        elbo: any Pyro ELBO, by its ``differentiable_loss``, else by its ``loss_and_grads``.
        backend: "inductor", torch's compiler, needs a C++ compiler on a CPU, and takes its normal noise
            there from torch's stream, as eager does; on a GPU it runs as a CUDA graph with a stream of its
            own. "eager" replays the captured operations one by one, and compiles nothing: the faster
            choice for a training of some thousand steps, which is over before a compilation has paid off.
        check: hold every step against an eager run with the same noise. Slow; for finding out what a
            capture froze.

    Raises:
        ValueError: if elbo or backend is none of these; from the first step of a signature, naming the line
            that cannot be captured and the mend, or if the graph does not repeat the pair; with ``check``,
            from any step.
        FloatingPointError: from a step under Pyro's SVI, if the loss or a gradient is not finite. The
            parameters are as before then, the buffers and the random state are not. This package's SVI
            restores those too, and names the site.

    Warns:
        UserWarning: once, at the fiftieth graph, since something is then probably new at every step.
    """

    def __init__(self, elbo: ELBO, *, backend: str = "inductor", check: bool = False) -> None:
        super().__init__()
        if not isinstance(elbo, ELBO) or isinstance(elbo, CompiledELBO):
            raise ValueError(f"CompiledELBO expects a Pyro ELBO, such as Trace_ELBO(), got {elbo!r}.")
        if backend not in ("inductor", "eager"):
            raise ValueError(f"backend is 'inductor', or 'eager' which compiles nothing, got {backend!r}.")
        vars(self).update(vars(elbo))  # num_particles and the like are those of the ELBO inside
        self.elbo: Any = elbo
        self.backend = backend
        self.check = check
        self._losses: dict[Hashable, _Loss] = {}
        self._trained: set[tuple[Program, Program]] = set()

    @property
    def num_graphs(self) -> int:
        """How many graphs have been captured so far."""
        return len(self._losses)

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Return the loss of a batch in nats."""
        return float(self._loss(model, guide, args, kwargs, gradients=False).run(args, kwargs)[0])

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Return the loss of a batch in nats, and add its gradients to the parameters'.

        Raises:
            FloatingPointError: if the loss or a gradient is not finite. No gradient is added then.
        """
        captured = self._loss(model, guide, args, kwargs, gradients=True)
        loss, finite, *gradients = captured.run(args, kwargs)
        if not finite:
            check_finite(loss, gradients)
        captured.add(gradients)
        return float(loss)

    def step(
        self,
        model: Program,
        guide: Program,
        inside: Inside,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        around: Callable[[], AbstractContextManager[None]],
    ) -> tuple[float, bool]:
        """Add the gradients; return the loss and whether loss and gradients are known to be finite.

        What is inside the programs is known. What runs them, which is a capture or a check, runs inside
        ``around()``.
        """
        key = _key(model, guide, inside, args, kwargs, gradients=True)
        captured = None if self.check else self._losses.get(key)
        if captured is None:
            with around():
                captured = self._loss(model, guide, args, kwargs, gradients=True)
        loss, finite, *gradients = captured.run(args, kwargs)
        captured.add(gradients)
        return float(loss), bool(finite)

    def _loss(
        self,
        model: Program,
        guide: Program,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        gradients: bool,
    ) -> "_Loss":
        key = _key(model, guide, Inside(model, guide), args, kwargs, gradients=gradients)
        loss = self._losses.get(key)
        if loss is None:
            loss = _Loss(self.elbo, model, guide, args, kwargs, gradients)
            loss.graph = Graph(loss, (model, guide), args, kwargs)
            # The first step is compiled at once; a smaller last batch, say, when it has come often.
            first = gradients and (model, guide) not in self._trained
            loss.until_compiled = -1 if self.backend == "eager" else 0 if first else _OFTEN
            self._losses[key] = loss
            if gradients:
                self._trained.add((model, guide))
            if len(self._losses) == _MANY:
                warnings.warn(
                    f"CompiledELBO has captured {_MANY} graphs, each of which costs time once and memory for "
                    "good. Is something new at every step: a number among the arguments, a handler's tensor "
                    "or function, the shape of the batch? Pass numbers as tensors, and batches of one size.",
                    stacklevel=3,
                )
        elif self.check:
            loss.graph.check(args, kwargs)
        if am_i_wrapped():
            loss.issue_statements()
        return loss

    def _get_trace(self, model: Program, guide: Program, args: Any, kwargs: Any) -> Any:
        return self.elbo._get_trace(model, guide, args, kwargs)


class _Loss:
    """The loss of a pair, and its gradients if asked for: what is captured."""

    def __init__(
        self,
        elbo: Any,
        model: Program,
        guide: Program,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        gradients: bool,
    ) -> None:
        self._elbo, self._model, self._guide = elbo, model, guide
        before = Before(model, guide)
        try:
            # A first run makes what is made at first use, and shows the parameter statements.
            with poutine.trace(param_only=True) as first, quiet():
                elbo.loss(model, guide, *args, **kwargs)
        finally:
            before.restore()
        store = pyro.get_param_store()
        self._statements = [
            (name, store._params[name], store._constraints[name]) for name in first.trace.nodes
        ]
        found = parameters(model, guide) + [p for _, p, _ in self._statements]
        self.trained = list({id(p): p for p in found}.values()) if gradients else []
        self.graph: Graph
        self.until_compiled: int  # so many uses; never, where it is negative from the start

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """Return what a call of it would, by its graph."""
        torch.clear_autocast_cache()  # which would hold the parameters of this step for a later run
        if self.until_compiled == 0:
            self.graph.compile()
        self.until_compiled -= 1
        results: list[Tensor] = self.graph(*args, **kwargs)
        return results

    def add(self, gradients: list[Tensor]) -> None:
        """Add gradients to those of the trained parameters."""
        for p, gradient in zip(self.trained, gradients, strict=True):
            p.grad = gradient if p.grad is None else p.grad + gradient

    def __call__(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        """Run the ELBO inside, as it is.

        Returns:
            The loss; whether the sum of all these numbers is finite; a gradient for each trained parameter. A
            parameter without a gradient leaves ``trained``.
        """
        if not self.trained:
            loss = torch.as_tensor(self._elbo.loss(self._model, self._guide, *args, **kwargs)).detach()
            return [loss, sum_is_finite([loss])]
        if hasattr(self._elbo, "differentiable_loss"):
            loss = self._elbo.differentiable_loss(self._model, self._guide, *args, **kwargs)
            gradients: Any = torch.autograd.grad(loss, self.trained, allow_unused=True)
        else:
            held = [p.grad for p in self.trained]
            for p in self.trained:
                p.grad = None
            try:
                model, guide = with_statements(self._model), with_statements(self._guide)
                loss = self._elbo.loss_and_grads(model, guide, *args, **kwargs)
                gradients = tuple(p.grad for p in self.trained)
            finally:
                for p, gradient in zip(self.trained, held, strict=True):
                    p.grad = gradient
        used = [(p, g) for p, g in zip(self.trained, gradients, strict=True) if g is not None]
        self.trained = [p for p, _ in used]
        memory: set[int] = set()
        distinct = []
        for p, g in used:
            # Autograd hands out one tensor for the gradients of a and b in a + b, and views. In p.grad they
            # have to lie as p does: torch's fused Adam takes for granted that they do (2.15).
            fits = g.untyped_storage().data_ptr() not in memory and g.stride() == p.stride()
            memory.add(g.untyped_storage().data_ptr())
            distinct.append(g.detach() if fits else torch.empty_like(p).copy_(g.detach()))
        loss = torch.as_tensor(loss).detach()
        return [loss, sum_is_finite([loss, *distinct]), *distinct]

    def issue_statements(self) -> None:
        """Make the pair's ``pyro.param`` statements, from which pyro.infer.SVI learns what to train."""
        stated = {id(p) for _, p, _ in self._statements}
        if any(id(p) not in stated for p in self.trained):
            raise ValueError(
                "pyro.infer.SVI would not train some of this pair's parameters: Pyro's store holds others of "
                "their names, of an earlier pair, or the pair is a plain nn.Module. Call "
                "pyro.clear_param_store() before a new pair, or use pyro_vae.SVI."
            )
        store = pyro.get_param_store()
        for name, p, constraint in self._statements:
            if store._params.setdefault(name, p) is not p:
                raise ValueError(
                    f"Pyro's parameter store holds another parameter named '{name}', of an earlier "
                    "pair. Expected this pair's: call pyro.clear_param_store(), or use pyro_vae.SVI."
                )
            store._constraints.setdefault(name, constraint)
            store._param_to_name.setdefault(p, name)
            pyro.param(name)


def _key(
    model: Program,
    guide: Program,
    inside: Inside,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    gradients: bool,
) -> Hashable:
    """What a graph is found by."""
    return model, guide, gradients, _state(inside), _around(), signature((args, kwargs))


def _state(inside: Inside) -> Hashable:
    """What a pair's graph depends on besides its arguments: modules with what they hold, and precision."""
    # A CUDA graph keeps the kernels of its first run.
    precision = torch.cuda.is_initialized() and torch._C._get_fp32_precision_getter("cuda", "matmul")
    state: list[Hashable] = [float32_products_use_bfloat16(), precision == "tf32"]
    for device in ("cpu", "cuda"):
        state.append(torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device))
    return (*state, *inside.state)


def _around() -> Hashable:
    """What a graph depends on around the step: the handlers, with all that they hold.

    The number of a KL weight is an input of the graph, so that one graph serves a whole warm-up. A trace
    changes nothing.
    """
    return tuple(
        (type(handler), () if isinstance(handler, KLWeight | TraceMessenger) else _held(vars(handler)))
        for handler in _PYRO_STACK
    )


def _held(value: Any) -> Hashable:
    """Tell a value from others: containers by what is in them, tensors and functions by identity."""
    if isinstance(value, dict):
        return tuple((key, _held(held)) for key, held in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(_held, value))
    return value if isinstance(value, Hashable) else id(value)
