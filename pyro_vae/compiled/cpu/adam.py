"""FusedAdam: torch's Adam by a shorter way."""

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from torch.optim.optimizer import Optimizer, _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from pyro_vae.compiled.cpu.cpp import Kernel, begin

_ONE = torch.tensor(1.0, device="cpu")


class FusedAdam(torch.optim.Adam):
    """``torch.optim.Adam(..., fused=True)`` with less Python in a step.

    Unless it is ``compiled``, its numbers are torch's; its state and its checkpoints always are. One
    exception: a gradient, or a running mean, that lies in memory otherwise than its parameter (an
    ``expand``, a transpose, ``channels_last``), which torch's takes for another one on a CPU. What torch's
    step asks for the sake of options that are not offered here is left out, which a small VAE's step gains by
    some percent.

    Args:
        params: as torch's.
        lr: learning rate.
        betas: decay of the running means of the gradient and of its square.
        eps: added to the root of the latter.
        weight_decay: factor of the parameters that is added to their gradient.
        compiled: update contiguous float32 parameters on a CPU by a loop that is compiled for this processor
            (``adam.cpp``). It takes half the time of torch's, and its numbers differ by rounding.

    Raises:
        ValueError: if a group of parameters asks for an option that this Adam lacks, or if ``compiled`` and
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
            begin("adam.cpp")  # it fails here or goes on, while there is something else to do
        super().__init__(params, lr, betas, eps, weight_decay, fused=True)
        self.compiled = compiled
        self._step_supports_amp_scaling = False  # a GradScaler then unscales the gradients itself

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, as torch's.

        Raises:
            ValueError: if it asks for an option that this Adam lacks.
        """
        _check_options(param_group)
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of an Adam of torch's, fused or not.

        Raises:
            ValueError: if it asks for an option that this Adam lacks, or is of parameters of other shapes.
                Nothing is changed then.
        """
        groups = [{**group, "fused": True, "foreach": False} for group in state_dict["param_groups"]]
        for group in groups:
            _check_options(group)
        held = [p for group in self.param_groups for p in group["params"]]
        saved = [number for group in groups for number in group["params"]]
        states = dict(state_dict["state"])
        for number, p in zip(saved, held, strict=False):  # torch refuses another number of parameters
            if number in states:
                means = states[number].keys() & {"exp_avg", "exp_avg_sq"}
                states[number] = {
                    **states[number],
                    **{key: _as_lies(states[number][key], p) for key in means},
                }
        super().load_state_dict({**state_dict, "state": states, "param_groups": groups})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters that have a gradient.

        Args:
            closure: computes the loss anew, if given.

        Returns:
            What the closure returned.

        Raises:
            ValueError: if a parameter has changed its shape since its gradient or its running means were
                made. No parameter of its group is changed then.
        """
        watched = (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or torch.autograd.profiler._is_profiler_enabled
        )
        return self._watched_step(closure) if watched else self._step(closure)

    # Or torch would wrap it in what serves hooks and the profiler, which takes as long as the rest of it.
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
                    self._init_group(group, [], [], [], [], [], [])  # which refuses a sparse gradient
                for each in trained:
                    _check_shapes(*each)
                if self.compiled:
                    trained = _update_compiled(trained, group)
                for kind in {(p.device, p.dtype) for p, _, _ in trained}:
                    _update([each for each in trained if (each[0].device, each[0].dtype) == kind], group)
        return loss

    _watched_step = Optimizer.profile_hook_step(_step)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "compiled": self.compiled}


# A parameter, its gradient and Adam's state of it.
_Trained = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]


def _check_shapes(p: torch.Tensor, gradient: torch.Tensor, state: dict[str, torch.Tensor]) -> None:
    # The loops take it for granted, torch's too, and would write beyond the shorter ones.
    mean, square = state["exp_avg"], state["exp_avg_sq"]
    if not p.shape == gradient.shape == mean.shape == square.shape:
        raise ValueError(
            f"A parameter of shape {tuple(p.shape)} has a gradient of shape {tuple(gradient.shape)} and "
            f"running means of shape {tuple(mean.shape)} and {tuple(square.shape)}. Expected its own shape, "
            "which must not change between two steps: make a new parameter, and a new optimiser."
        )


def _update_compiled(trained: list[_Trained], group: dict[str, Any]) -> list[_Trained]:
    """Update the parameters that the compiled loop takes; return the others."""
    options = group["lr"], *group["betas"], group["eps"], group["weight_decay"]
    numbers = _numbers(*map(float, options))  # torch allows tensors, which may change in place
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
    """Update parameters of one device and dtype by torch's kernel."""
    states = [state for _, _, state in trained]
    for p, _, state in trained:  # p may have been laid out anew since
        state.update({key: _as_lies(state[key], p) for key in ("exp_avg", "exp_avg_sq")})
    steps = [state["step"] for state in states]
    if steps[0].is_cpu:
        torch._foreach_add_(steps, _ONE, alpha=1.0)  # a number would be made a tensor for each of them
    else:
        torch._foreach_add_(steps, 1)
    torch._fused_adam_(
        [p for p, _, _ in trained],
        [_as_lies(gradient, p) for p, gradient, _ in trained],
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
def _numbers(*options: float) -> torch.Tensor:
    """Return the options of a group as the compiled loop takes them."""
    return torch.tensor(options, dtype=torch.float64, device="cpu")


@cache
def _kernel() -> Kernel:
    return begin("adam.cpp")()


def _check_options(group: dict[str, Any]) -> None:
    asked = [name for name in ("amsgrad", "maximize", "decoupled_weight_decay") if group.get(name)]
    if asked:
        raise ValueError(
            f"A group of parameters asks for {', '.join(asked)}, which FusedAdam lacks. Expected Adam "
            "without: give SVI a torch optimiser that has it, torch.optim.Adam or AdamW."
        )


def _as_lies(tensor: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Return a tensor of p's shape, laid out in memory as p is.

    Torch's kernel takes that for granted, and would take a transposed gradient for another one (2.15).
    """
    if tensor.shape != p.shape:
        raise ValueError(
            f"A checkpoint holds a running mean of shape {tuple(tensor.shape)} for a parameter of shape "
            f"{tuple(p.shape)}. Expected one of the same parameters, in the same order."
        )
    return tensor if tensor.stride() == p.stride() else torch.empty_like(p).copy_(tensor)
