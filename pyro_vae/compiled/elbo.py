"""CompiledELBO: any model, guide and ELBO captured once as a graph of tensor operations, and compiled.

Pyro's handlers run in Python at every step. A compiler that follows the Python stops at each of them. But for
a pair of static structure they always compute the same tensor operations. So one run of the loss and its
gradients is recorded below the handlers (``make_fx``). The parameters and buffers become inputs of the graph.
From then on, a step is one call of the compiled graph.
"""

import warnings
from collections.abc import Hashable
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.poutine.runtime import _PYRO_STACK, am_i_wrapped
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor

from pyro_vae.arguments import check_flag, given, require
from pyro_vae.compiled.attributes import describe, describe_attributes, identity, leave_out, read_attributes
from pyro_vae.compiled.graph import CapturedGraph
from pyro_vae.compiled.internals import hooks_on_parameter
from pyro_vae.compiled.recording import no_hooks, no_value_checks
from pyro_vae.elbos.kl_weight import KLWeight, active_weights
from pyro_vae.programs import Pair, PairCache, Program, parameters
from pyro_vae.programs.observations import check_finite, sum_is_finite
from pyro_vae.programs.pair import leaves

# With this number of graphs, something is probably new at every step.
_MANY = 50


class CompiledELBO(ELBO):
    """An ELBO whose loss and gradients run as one compiled graph. It replaces ``Jit*_ELBO``.

    ::

        svi = SVI(model, guide, optim, loss=CompiledELBO(TraceMeanField_ELBO()))

    It replaces the ELBO inside, under this package's SVI and Pyro's. The first step of each signature is
    captured and compiled, which takes some seconds. A loss without gradients is captured, and its operations
    are replayed one by one. A signature consists of

    - the shapes, dtypes and devices of all tensors in the arguments, and the values of the other arguments;
    - the modules and their trainable parameters, with dtypes and memory layouts;
    - each module's train or eval mode and attributes (numbers by value, tensors and functions by identity);
    - autocast, the number of threads and whether operations are deterministic.

    So a smaller last batch has another graph, which is compiled too. Parameters, buffers and tensors that the
    pair closes over are read at every step, and random operations draw new noise. A *Python* number that
    changes from step to step needs a graph each time: pass it as a tensor. A number that no module holds goes
    unnoticed. Graphs are kept while their pair exists. A copy of a CompiledELBO, or a pickled one, starts
    without graphs.

    Hooks on parameters run at every step, on the gradients that the graph returns. Hooks on modules are
    refused. So are tensors that require gradients but are not parameters of the pair: for example, a batch
    from a network that an eager step would train.

    Pair and ELBO must have static structure: the same sites and operations at every step. A capture refuses
    operations that read a tensor into Python (``if z.sum() > 0``). Every capture is compared with a second,
    eager run with the same noise. This finds what changes between two runs.

    Args:
        elbo: any Pyro ELBO, by its ``differentiable_loss``, else by its ``loss_and_grads``.
        backend: "inductor" is torch's compiler. On a CPU it needs a C++ compiler, and takes its normal noise
            from torch's random stream, as an eager run does. On a GPU it runs as a CUDA graph with another
            stream. "eager" replays the captured operations one by one, and compiles nothing. It is faster for
            a training of some thousand steps, which ends before a compilation pays off.
        check: compare every step with an eager run with the same noise. This is slow, but finds what a
            capture froze.

    Raises:
        ValueError: if elbo or backend is of another kind; from the first step of a signature, naming the line
            that cannot be captured and how to fix it, or if the graph does not repeat the pair; with
            ``check``, from any step.
        FloatingPointError: from a step under Pyro's SVI, if the loss or a gradient is not finite. Then the
            parameters do not change, but the buffers and the random state do. This package's SVI restores
            those too, and names the site.

    Warns:
        UserWarning: once, at the fiftieth graph, since something is then probably new at every step.
    """

    def __init__(self, elbo: ELBO, *, backend: str = "inductor", check: bool = False) -> None:
        super().__init__()
        if not isinstance(elbo, ELBO) or isinstance(elbo, CompiledELBO):
            raise ValueError(
                f"elbo: expected a Pyro ELBO, got {elbo!r}. To fix: write CompiledELBO(Trace_ELBO())."
            )
        known = isinstance(backend, str) and backend in ("inductor", "eager")
        require(known, "backend", "'inductor' or 'eager'", given(backend), "'eager' compiles nothing")
        check_flag("check", check)
        vars(self).update(vars(elbo))  # num_particles and other settings are those of the ELBO inside
        self.elbo: Any = elbo
        self.backend = backend
        self.check = check
        self._cache: PairCache[_CapturedLoss] = PairCache()

    @property
    def num_graphs(self) -> int:
        """The number of graphs captured so far."""
        return self._cache.num_added

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Return the loss of a batch in nats."""
        pair = Pair(model, guide, args, kwargs)
        return float(self._captured(pair, gradients=False).run(pair)[0])

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Return the loss of a batch in nats, and add its gradients to those of the parameters.

        Raises:
            FloatingPointError: if the loss or a gradient is not finite. No gradient is added then.
        """
        pair = Pair(model, guide, args, kwargs)
        captured = self._captured(pair, gradients=True)
        loss, finite, *gradients = captured.run(pair)
        if not finite:
            check_finite(loss, gradients)
        captured.add(gradients)
        return float(loss)

    def add_gradients(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """Add the gradients of a pair's loss, isolated from Pyro's store. Nothing waits for the device.

        Returns:
            The loss in nats, (), and whether loss and gradients are known to be finite, a bool ().
        """
        captured = None if self.check else self._cache.results(pair).get(self._key(pair, gradients=True))
        if captured is None:
            with pair.isolated(validate=False):  # a graph needs no store, but a capture runs the programs
                captured = self._captured(pair, gradients=True)
        loss, finite, *gradients = captured.run(pair)
        changed = captured.add(gradients)
        return loss, finite & (not changed)

    def _captured(self, pair: Pair, *, gradients: bool) -> "_CapturedLoss":
        """Return the captured loss of a pair, from the cache if it is there."""
        for weight in active_weights(pair.model, pair.guide):
            weight.number()  # a graph does not look at its inputs
        known, key = self._cache.results(pair), self._key(pair, gradients=gradients)
        captured = known.get(key)
        if captured is None:
            # A rule that only reads the step: what is compiled does not depend on earlier steps.
            compiled = gradients and self.backend == "inductor"
            captured = _CapturedLoss(self.elbo, pair, gradients, compiled)
            # A first run may have made parameters or attributes.
            after = Pair(pair.model, pair.guide, pair.args, pair.kwargs)
            self._cache.add(after, self._key(after, gradients=gradients), captured)
            if self.num_graphs == _MANY:
                warnings.warn(
                    f"CompiledELBO has captured {_MANY} graphs, each of which costs time and memory. Is "
                    "something new at every step: a number among the arguments or in an attribute, a "
                    "handler's tensor or function, the shape of the batch? Pass numbers as tensors, and "
                    "batches of one size.",
                    stacklevel=3,
                )
        elif self.check:
            captured.check(pair)
        if am_i_wrapped():
            captured.issue_statements()
        return captured

    def _key(self, pair: Pair, *, gradients: bool) -> Hashable:
        """Return the cache key of a captured loss."""
        around = _settings(), _handlers_around()
        # A weight around a program is no input of the graph.
        weights = active_weights(pair.model, pair.guide)[len(active_weights()) :]
        held = describe(vars(self.elbo)), *(identity(weight.beta) for weight in weights)
        return gradients, *around, *held, describe_attributes(pair), pair.signature(exact=True)

    def _get_trace(self, model: Program, guide: Program, args: Any, kwargs: Any) -> Any:
        return self.elbo._get_trace(model, guide, args, kwargs)


class _CapturedLoss:
    """The loss of a pair, with its gradients if asked for, captured as a graph. It does not hold the pair."""

    def __init__(self, elbo: Any, pair: Pair, gradients: bool, compiled: bool) -> None:
        self._elbo = elbo
        if gradients:
            _check_no_gradients("batch", leaves((pair.args, pair.kwargs)))
            _check_no_gradients("KL weight", [weight.beta for weight in active_weights()])
        before, attributes = pair.snapshot(), read_attributes(pair)
        try:
            # A first run makes parameters that need a first use, and shows the parameter statements.
            with poutine.trace(param_only=True) as first, no_value_checks():
                elbo.loss(pair.model, pair.guide, *pair.args, **pair.kwargs)
        finally:
            before.restore()
        store = pyro.get_param_store()
        self._statements = [
            (name, store._params[name], store._constraints[name])
            for name in first.trace.nodes
            if name in store._params  # a frozen parameter is not
        ]
        found = parameters(pair.model, pair.guide) + [p for _, p, _ in self._statements]
        self._trained = list({id(p): p for p in found}.values()) if gradients else []
        trained = set(map(id, self._trained))
        self._graph = CapturedGraph(self._compute, pair)
        if gradients:
            _check_no_gradients("pair", [t for t in self._graph.read if id(t) not in trained])
        leave_out(pair, attributes)
        if compiled:
            self._graph.compile()

    def run(self, pair: Pair) -> list[Tensor]:
        """Return the loss, whether it and its gradients are finite, and the gradients, by the graph."""
        torch.clear_autocast_cache()  # it would keep the parameters of this step for a later run
        results: list[Tensor] = self._graph(pair)
        return results

    def check(self, pair: Pair) -> None:
        """Compare the graph with an eager run, as :meth:`CapturedGraph.check`."""
        self._graph.check(self._compute, pair)

    def add(self, gradients: list[Tensor]) -> bool:
        """Add gradients to those of the trained parameters; return whether a hook may have changed them."""
        if any(map(hooks_on_parameter, self._trained)):
            torch.autograd.backward(self._trained, gradients)  # runs all hooks, as an eager step does
            return True
        for p, gradient in zip(self._trained, gradients, strict=True):
            p.grad = gradient if p.grad is None else p.grad + gradient
        return False

    def _compute(self, pair: Pair) -> list[Tensor]:
        """Run the ELBO inside on a pair. This run is captured.

        Returns:
            The loss; whether the sum of all these numbers is finite; a gradient for each trained parameter. A
            parameter without a gradient is no longer among the trained ones.
        """
        if not self._trained:
            loss = self._elbo.loss(pair.model, pair.guide, *pair.args, **pair.kwargs)
            loss = torch.as_tensor(loss).detach()
            return [loss, sum_is_finite([loss])]
        with no_hooks(self._trained):
            loss, gradients = self._differentiate(pair)
        used = [(p, g) for p, g in zip(self._trained, gradients, strict=True) if g is not None]
        self._trained = [p for p, _ in used]
        memory: set[int] = set()
        distinct = []
        for p, g in used:
            # Autograd returns one tensor as the gradient of both a and b in a + b, and also views. Each
            # p.grad must have its own memory, in the layout of p: torch's fused Adam assumes this (2.15).
            fits = g.untyped_storage().data_ptr() not in memory and g.stride() == p.stride()
            memory.add(g.untyped_storage().data_ptr())
            distinct.append(g.detach() if fits else torch.empty_like(p).copy_(g.detach()))
        loss = torch.as_tensor(loss).detach()
        return [loss, sum_is_finite([loss, *distinct]), *distinct]

    def _differentiate(self, pair: Pair) -> Any:
        """Return the loss, and its gradient or None for each trained parameter."""
        if hasattr(self._elbo, "differentiable_loss"):
            loss = self._elbo.differentiable_loss(pair.model, pair.guide, *pair.args, **pair.kwargs)
            return loss, torch.autograd.grad(loss, self._trained, allow_unused=True)
        kept = [p.grad for p in self._trained]
        for p in self._trained:
            p.grad = None
        try:
            stating = pair.with_module_statements()
            loss = self._elbo.loss_and_grads(stating.model, stating.guide, *pair.args, **pair.kwargs)
            return loss, tuple(p.grad for p in self._trained)
        finally:
            for p, gradient in zip(self._trained, kept, strict=True):
                p.grad = gradient

    def issue_statements(self) -> None:
        """Make the pair's ``pyro.param`` statements, from which pyro.infer.SVI learns what to train."""
        stated = {id(p) for _, p, _ in self._statements}
        if any(id(p) not in stated for p in self._trained):
            raise ValueError(
                "pyro.infer.SVI: expected to find all parameters of this pair in Pyro's store, got those of "
                "an earlier pair with the same names, or a plain nn.Module, so it would not train all. To "
                "fix: call pyro.clear_param_store() before a new pair, or use pyro_vae.SVI."
            )
        store = pyro.get_param_store()
        for name, p, constraint in self._statements:
            if store._params.setdefault(name, p) is not p:
                raise ValueError(
                    f"Pyro's parameter store: expected the parameter '{name}' of this pair, got that of an "
                    "earlier pair with the same name. To fix: call pyro.clear_param_store(), or use "
                    "pyro_vae.SVI."
                )
            store._constraints.setdefault(name, constraint)
            store._param_to_name.setdefault(p, name)
            pyro.param(name)


def _check_no_gradients(what: str, values: list[Any]) -> None:
    """Refuse tensors whose gradients an eager step would pass on to their source.

    Raises:
        ValueError: naming the shape of the first one.
    """
    for value in values:
        if isinstance(value, Tensor) and value.requires_grad:
            raise ValueError(
                f"The {what}: expected only parameters of the modules to require gradients, got a tensor of "
                f"shape {tuple(value.shape)} that requires them, so a graph would not train its source. To "
                "fix: compute it inside model or guide from their parameters, or detach it."
            )


def _settings() -> Hashable:
    """Describe the settings of torch that a graph keeps: precision, threads, deterministic operations."""
    autocast = [
        torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) for device in ("cpu", "cuda")
    ]
    # A CUDA graph keeps the kernels of its first run; a compiled loop keeps its number of threads.
    on_cuda = torch.cuda.is_initialized() and _float32_products_use_tf32()
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    return on_cuda, *autocast, threads, deterministic


def _float32_products_use_tf32() -> bool:
    matmul: Any = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)  # torch 2.9
    return bool(matmul.allow_tf32 if precision is None else precision == "tf32")


def _handlers_around() -> Hashable:
    """Describe the Pyro handlers around a step, with everything that they hold.

    The number of a KL weight is an input of the graph, so a whole warm-up needs one graph. A trace changes
    nothing.
    """
    return tuple(
        (
            type(handler),
            getattr(handler.beta, "requires_grad", False)
            if isinstance(handler, KLWeight)
            else ()
            if isinstance(handler, TraceMessenger)
            else _identify(vars(handler)),
        )
        for handler in _PYRO_STACK
    )


def _identify(value: Any) -> Hashable:
    """Describe a container by its contents, a tensor, function or module by identity, the rest by value."""
    if isinstance(value, dict):
        return tuple((key, _identify(inside)) for key, inside in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(_identify, value))
    return identity(value)
