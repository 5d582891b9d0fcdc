"""Internals: every private name of torch that this folder uses, and what it patches in Pyro.

Any version may remove a private name. Each is here once, behind a function that says what it is for and what
happens without it. No eager step imports this file.
"""

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any
from unittest import mock

import pyro.infer.util
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.modules import module as torch_module


def recorder() -> Callable[[Callable[..., Any]], Callable[..., GraphModule]]:
    """Return ``make_fx``, which records the operations of a function, also those of a backward pass.

    Raises:
        ValueError: if this torch has no ``make_fx``: there is no other way.
    """
    try:
        from torch.fx.experimental.proxy_tensor import make_fx
    except ImportError as error:
        raise ValueError(
            f"CompiledELBO: expected make_fx in torch, got torch {torch.__version__} without it. To fix: use "
            "the ELBO alone, or another version of torch."
        ) from error
    return make_fx


def compile_graph(graph: GraphModule, inputs: Sequence[Tensor], *, on_cuda: bool) -> Callable[..., Any]:
    """Compile a graph by torch's compiler, inductor.

    ``torch._inductor.compile`` is called without ``torch.compile`` around it. The guards of the latter would
    check at every call what the cache key of the graph already ensures. If the name is missing, the graph is
    replayed, with a warning.
    """
    try:
        from torch import _inductor

        compile_by_inductor, known = _inductor.compile, _inductor.list_options()
    except (ImportError, AttributeError):
        warnings.warn(
            f"CompiledELBO: torch {torch.__version__} has no torch._inductor.compile, so graphs are "
            "replayed, as by backend='eager'.",
            stacklevel=2,
        )
        return graph
    options = {
        "triton.cudagraphs": on_cuda,
        # On a CPU torch's own noise is faster than the compiler's, and is that of an eager run.
        "fallback_random": not on_cuda,
    }
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        # Otherwise the compiler builds test programs to find out, which takes seconds.
        options["cpp.vec_isa_ok"] = True
    options = {name: value for name, value in options.items() if name in known}
    compiled: Callable[..., Any] = compile_by_inductor(graph, list(inputs), options)
    return compiled


@contextmanager
def reading_nothing() -> Iterator[None]:
    """Keep Pyro from reading tensors, for shortcuts, for warnings and to drop terms by value.

    Pyro asks ``torch._C._get_tracing_state`` before it reads a tensor. But it always reads in
    ``warn_if_nan``, and in ``Dice.compute_expectation``, which drops terms of probability 0. If a name is
    missing, Pyro reads, and the capture is refused.
    """
    with ExitStack() as stack:

        def patch(owner: Any, name: str, value: Any) -> None:
            if hasattr(owner, name):
                stack.enter_context(mock.patch.object(owner, name, value))

        patch(torch._C, "_get_tracing_state", lambda: True)
        for name, module in list(sys.modules.items()):
            if name.startswith("pyro.infer"):
                patch(module, "warn_if_nan", lambda value, *_, **__: value)
        dice = getattr(pyro.infer.util, "Dice", None)
        expectation: Any = getattr(dice, "compute_expectation", None)

        def select(x: Tensor, mask: Tensor) -> Tensor:
            return torch.where(mask, x, 0).flatten()

        def expectation_of_one_shape(*args: Any, **kwargs: Any) -> Any:
            with mock.patch.object(Tensor, "masked_select", select):
                return expectation(*args, **kwargs)

        patch(dice, "compute_expectation", expectation_of_one_shape)
        yield


@contextmanager
def one_fake_mode() -> Iterator[None]:
    """Let torch describe all results that are recorded in one ``FakeTensorMode``.

    ``make_fx`` would make a mode for every result, which is a third of the time of a capture. If a name is
    missing, it does so.
    """
    try:
        from torch._guards import TracingContext, tracing
        from torch._subclasses.fake_tensor import FakeTensorMode
    except ImportError:
        yield
        return
    with tracing(TracingContext(FakeTensorMode())):
        yield


@contextmanager
def no_kept_sources() -> Iterator[None]:
    """Drop the source code of the graphs that are made inside this context.

    torch.fx keeps it for tracebacks in ``_loader.eval_cache``, as long as the process runs: some 50 kB for
    each capture. If that name is missing, it stays.
    """
    sources = getattr(getattr(torch.fx.graph_module, "_loader", None), "eval_cache", {})
    before = set(sources)
    try:
        yield
    finally:
        for key in sources.keys() - before:
            del sources[key]


MODULE_HOOKS = frozenset(("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks"))
_PARAMETER_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


def check_hooks_are_seen() -> None:
    """Refuse a torch that keeps hooks under other names, since a graph would silently leave them out.

    Raises:
        ValueError: with the names that are missing.
    """
    module, p = nn.Module(), nn.Parameter(torch.zeros(()))
    missing = [kind for kind in MODULE_HOOKS if not hasattr(module, kind)]
    missing += [f"_global{kind}" for kind in MODULE_HOOKS if not hasattr(torch_module, f"_global{kind}")]
    missing += [kind for kind in _PARAMETER_HOOKS if not hasattr(p, kind)]
    if missing:
        raise ValueError(
            f"CompiledELBO: expected to see hooks, got torch {torch.__version__} without {sorted(missing)}. "
            "To fix: use the ELBO alone, or another version of torch."
        )


def hooks_on_all_modules() -> list[dict[int, Any]]:
    """Return the hooks that run for every module."""
    found = [getattr(torch_module, f"_global{kind}") for kind in MODULE_HOOKS]
    return [hooks for hooks in found if hooks]


def hooks_on_module(module: nn.Module) -> list[Any]:
    """Return the hooks on a module."""
    return [hook for kind in MODULE_HOOKS for hook in vars(module)[kind].values()]


def hooks_on_parameter(p: Tensor) -> list[dict[int, Any]]:
    """Return the dictionaries of the hooks on a parameter's gradient, if there are any.

    They are ``_backward_hooks`` and ``_post_accumulate_grad_hooks``.
    """
    hooks: Any = p._backward_hooks, p._post_accumulate_grad_hooks
    return [each for each in hooks if each]


def copies(tensors: list[Tensor]) -> list[Tensor]:
    """Return copies of tensors, those of one dtype by one ``torch._foreach_clone``, if there is one."""
    clone: Any = getattr(torch, "_foreach_clone", None)
    return [tensor.clone() for tensor in tensors] if clone is None else list(clone(tensors))


def is_compiled(module: nn.Module) -> bool:
    """Return whether ``torch.compile(module)`` or ``module.compile()`` has compiled a module.

    Torch says so in ``_orig_mod`` and ``_compiled_call_impl``. Without them, make_fx refuses the module in
    its own words.
    """
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def hooks_on_step(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimiser has hooks on its step, or may have some."""
    own = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    of_all = ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks")
    module = sys.modules.get("torch.optim.optimizer")
    found = [getattr(optimizer, name, True) for name in own]
    return any([*found, *(getattr(module, name, True) for name in of_all)])


def skips_on_request(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimiser skips an update if its ``found_inf`` is 1, as for torch's GradScaler.

    Torch's fused optimisers do. (They say so in an attribute, but a copy of them lacks it.)
    """
    fused = all(group.get("fused") for group in optimizer.param_groups)
    return fused and type(optimizer) in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)


@cache
def onednn_linear() -> Any:
    """Return oneDNN's float32 product ``linear(a, b^T, bias, "none", [], "")``, None where there is none.

    With None, products stay with torch. If torch was built with oneDNN, and only the name is missing, a
    warning says so.
    """
    try:
        return torch.ops.mkldnn._linear_pointwise.default
    except (AttributeError, RuntimeError):
        if torch.backends.mkldnn.is_available():
            warnings.warn(
                f"CompiledELBO: torch {torch.__version__} has no torch.ops.mkldnn._linear_pointwise, so "
                "matrix products are MKL's, which is slower on some processors.",
                stacklevel=2,
            )
        return None


@cache
def multiplies_bfloat16() -> bool:
    """Return whether this processor multiplies bfloat16, so that torch's own products of it are fast.

    Where ``torch.ops.mkldnn._is_mkldnn_bf16_supported`` is missing, products stay as they are.
    """
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return True
