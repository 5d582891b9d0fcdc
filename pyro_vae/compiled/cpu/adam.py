"""FusedAdam: torch's fused Adam with less overhead in each step."""

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from torch.optim.optimizer import Optimizer, _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from pyro_vae.compiled.cpu.cpp_kernels import CppKernel, start_compiling

_ONE = torch.tensor(1.0, device="cpu")


class FusedAdam(torch.optim.Adam):
    """``torch.optim.Adam(..., fused=True)`` with less Python in each step.

    Its state and checkpoints are those of torch's Adam, and so are its numbers unless ``compiled=True``.
    There is one exception: a gradient or a running mean whose strides differ from its parameter's (an
    ``expand``, a transpose, ``channels_last``). Torch's fused Adam reads those in the wrong order on a CPU;
    this one does not. It leaves out what torch does for options that this class does not have, which makes
    a small VAE's step some percent faster.

    Args:
        params: the parameters, or groups of parameters, as for ``torch.optim.Adam``.
        lr: learning rate.
        betas: decay rates of the running means of the gradient and of its square.
        eps: added to the square root of the running mean of the squared gradient.
        weight_decay: this times the parameter is added to its gradient.
        compiled: update contiguous float32 parameters on a CPU by a C++ loop (``adam.cpp``) that is compiled
            for this processor. It takes half the time of torch's loop; its numbers differ by rounding.

    Raises:
        ValueError: if a group of parameters has an option that this class lacks, or if ``compiled`` and
            there is no C++ compiler.

    References:
        Kingma and Ba 2014, arXiv 1412.6980.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        compiled: bool = False,
    ) -> None:
        if compiled:
            start_compiling("adam.cpp")  # fails here, or goes on in a second thread
        super().__init__(params, lr, betas, eps, weight_decay, fused=True)
        self.compiled = compiled
        self._step_supports_amp_scaling = False  # then a GradScaler unscales the gradients

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, as ``torch.optim.Adam`` does.

        Raises:
            ValueError: if it has an option that this class lacks.
        """
        _check_options(param_group)
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this class or of ``torch.optim.Adam``, fused or not.

        Raises:
            ValueError: if it has an option that this class lacks, or belongs to parameters of other shapes.
                Then nothing changes.
        """
        groups = [{**group, "fused": True, "foreach": False} for group in state_dict["param_groups"]]
        for group in groups:
            _check_options(group)
        own = [p for group in self.param_groups for p in group["params"]]
        saved = [number for group in groups for number in group["params"]]
        states = dict(state_dict["state"])
        for number, p in zip(saved, own, strict=False):  # torch checks their number below
            if number in states:
                means = states[number].keys() & {"exp_avg", "exp_avg_sq"}
                states[number] = {
                    **states[number],
                    **{key: _with_strides_of(states[number][key], p) for key in means},
                }
        super().load_state_dict({**state_dict, "state": states, "param_groups": groups})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters that have a gradient.

        Args:
            closure: computes the loss and its gradients again, if given.

        Returns:
            The result of the closure, or None.

        Raises:
            ValueError: if the shape of a parameter is not that of its gradient and running means. Then no
                parameter of its group changes.
        """
        has_hooks = (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or torch.autograd.profiler._is_profiler_enabled
        )
        return self._step_with_hooks(closure) if has_hooks else self._step(closure)

    # Keep torch from wrapping step in code for hooks and the profiler, which takes as long as step itself.
    step.hooked = True  # type: ignore[attr-defined]

    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            for group in self.param_groups:
                trained = [(p, p.grad, self.state[p]) for p in group["params"] if p.grad is not None]
                if not all(state and not gradient.is_sparse for _, gradient, state in trained):
                    self._init_group(group, [], [], [], [], [], [])  # raises an error for a sparse gradient
                for each in trained:
                    _check_shapes(*each)
                if self.compiled:
                    trained = _update_compiled(trained, group)
                for kind in {(p.device, p.dtype) for p, _, _ in trained}:
                    _update([each for each in trained if (each[0].device, each[0].dtype) == kind], group)
        return loss

    _step_with_hooks = Optimizer.profile_hook_step(_step)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "compiled": self.compiled}


# A parameter, its gradient and its state in Adam.
_Trained = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]


def _check_shapes(p: torch.Tensor, gradient: torch.Tensor, state: dict[str, torch.Tensor]) -> None:
    # Neither this loop nor torch's checks the shapes: they would write beyond the end of a shorter tensor.
    mean, square = state["exp_avg"], state["exp_avg_sq"]
    if not p.shape == gradient.shape == mean.shape == square.shape:
        raise ValueError(
            f"FusedAdam: expected a gradient and running means of the parameter's shape {tuple(p.shape)}, "
            f"got a gradient of shape {tuple(gradient.shape)} and running means of shape {tuple(mean.shape)} "
            f"and {tuple(square.shape)}. The shape must not change between two steps. To fix: make a new "
            "parameter and a new optimiser."
        )


def _update_compiled(trained: list[_Trained], group: dict[str, Any]) -> list[_Trained]:
    """Update the parameters that the compiled loop supports; return the others."""
    options = group["lr"], *group["betas"], group["eps"], group["weight_decay"]
    numbers = _options_tensor(*map(float, options))  # an option may be a tensor that changes in place
    kernel = _kernel()
    others = []
    for p, gradient, state in trained:
        mean, square, steps = state["exp_avg"], state["exp_avg_sq"], state["step"]
        if (
            (p.is_cpu and mean.is_cpu)
            and p.dtype is gradient.dtype is mean.dtype is square.dtype is steps.dtype is torch.float32
            and (p.is_contiguous() and gradient.is_contiguous() and not gradient.is_neg())
            and (mean.is_contiguous() and square.is_contiguous())
        ):
            kernel(p, gradient, mean, square, steps, numbers, p.numel())
        else:
            others.append((p, gradient, state))
    return others


def _update(trained: list[_Trained], group: dict[str, Any]) -> None:
    """Update parameters of one device and dtype by torch's fused kernel."""
    states = [state for _, _, state in trained]
    for p, _, state in trained:  # the strides of p may have changed since the last step
        state.update({key: _with_strides_of(state[key], p) for key in ("exp_avg", "exp_avg_sq")})
    steps = [state["step"] for state in states]
    if steps[0].is_cpu:
        torch._foreach_add_(steps, _ONE, alpha=1.0)  # a Python number would become a new tensor for each
    else:
        torch._foreach_add_(steps, 1)
    torch._fused_adam_(
        [p for p, _, _ in trained],
        [_with_strides_of(gradient, p) for p, gradient, _ in trained],
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        steps,
        lr=group["lr"],
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        amsgrad=False,
        maximize=False,
    )


@lru_cache(maxsize=16)
def _options_tensor(*options: float) -> torch.Tensor:
    """Return the options of a group in the form that the compiled loop expects."""
    return torch.tensor(options, dtype=torch.float64, device="cpu")


@cache
def _kernel() -> CppKernel:
    return start_compiling("adam.cpp")()


def _check_options(group: dict[str, Any]) -> None:
    unsupported = [name for name in ("amsgrad", "maximize", "decoupled_weight_decay") if group.get(name)]
    if unsupported:
        raise ValueError(
            "FusedAdam: expected parameter groups without amsgrad, maximize and decoupled weight decay, got "
            f"{', '.join(unsupported)}. To fix: give SVI a torch optimiser that has it, torch.optim.Adam or "
            "torch.optim.AdamW."
        )


def _with_strides_of(tensor: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Return the tensor with the strides of p, copied if necessary.

    Torch's kernel assumes equal strides and would read a transposed gradient in the wrong order (2.15).
    """
    if tensor.shape != p.shape:
        raise ValueError(
            "FusedAdam: expected a checkpoint of the same parameters, got a running mean of shape "
            f"{tuple(tensor.shape)} for a parameter of shape {tuple(p.shape)}. To fix: load a checkpoint "
            "whose parameters have the same shapes, in the same order."
        )
    return tensor if tensor.stride() == p.stride() else torch.empty_like(p).copy_(tensor)
