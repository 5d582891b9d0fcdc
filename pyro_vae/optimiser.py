"""The torch optimiser of an SVI: how it is made from a PyroOptim, and the strides of its tensors."""

from typing import Any, cast
from weakref import WeakSet

import torch
from pyro.optim import PyroOptim
from pyro.optim.lr_scheduler import PyroLRScheduler

# The PyroOptims from which an SVI has made its torch optimiser.
_taken_recipes: WeakSet[PyroOptim] = WeakSet()


def parameters_of(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    """Return the parameters of all groups of an optimiser."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def check_optimizer(optim: torch.optim.Optimizer) -> None:
    """Refuse an optimiser that computes the loss again while it steps."""
    if isinstance(optim, torch.optim.LBFGS):
        raise ValueError(
            "optim: expected an optimiser that steps on a gradient, got LBFGS, which computes the loss again "
            "while it steps. To fix: use torch.optim.Adam."
        )


def check_recipe(optim: Any) -> None:
    """Refuse what one torch optimiser cannot do for a PyroOptim."""
    if isinstance(optim, type):
        raise ValueError(
            f"optim: expected an optimiser, got its class {optim.__name__}. To fix: make one, "
            "torch.optim.Adam(pyro_vae.parameters(model, guide), lr=1e-3)."
        )
    if not isinstance(optim, PyroOptim) or isinstance(optim, PyroLRScheduler):
        raise ValueError(
            "optim: expected a torch optimiser, or a PyroOptim such as pyro.optim.Adam with its "
            f"arguments in a dict, got {type(optim).__name__}. To fix: for a learning-rate schedule, make a "
            "torch.optim.lr_scheduler of svi.optimizer and pass it to fit(..., scheduler=...)."
        )
    if callable(optim.pt_optim_args):
        raise ValueError(
            "optim: expected a PyroOptim with its arguments in a dict, got a callable. To fix: for arguments "
            "that differ between parameters, pass a torch optimiser with parameter groups."
        )
    if optim.pt_clip_args:
        raise ValueError(
            f"optim: expected a PyroOptim that does not clip, got {optim.pt_clip_args}. To fix: pass a torch "
            "optimiser and clip with torch.nn.utils.clip_grad_norm_ in a hook of it "
            "(register_step_pre_hook)."
        )
    if optim in _taken_recipes:
        raise ValueError(
            f"optim: expected a PyroOptim that only this SVI uses, got a {type(optim).__name__} that another "
            "SVI already uses. Its state (Adam's averages) is in that SVI and would not be shared. To fix: "
            "make a new PyroOptim, or pass svi.optimizer of that SVI, a torch optimiser."
        )
    if optim.optim_objs or optim._state_waiting_to_be_consumed:
        raise ValueError(
            "optim: expected a fresh PyroOptim, got one that holds the state of earlier steps, which "
            "would be dropped. To fix: load a torch state with svi.optimizer.load_state_dict(...)."
        )


def as_torch(optim: PyroOptim, trainable: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Return the one torch optimiser that a PyroOptim describes, fused where that is faster."""
    make: Any = optim.pt_optim_constructor
    options: dict[str, Any] = {**cast(dict[str, Any], optim.pt_optim_args)}
    chosen = {"foreach", "fused", "differentiable"} & options.keys()
    fusible = all(
        p.device.type in ("cpu", "cuda") and p.is_floating_point() and _is_dense(p) for p in trainable
    )
    if fusible and not chosen and make in (torch.optim.Adam, torch.optim.AdamW):
        options["fused"] = True
    optimizer: torch.optim.Optimizer = make(trainable, **options)
    _taken_recipes.add(optim)
    return optimizer


def check_state(optimizer: torch.optim.Optimizer) -> None:
    """Refuse running means of another dtype or device than their parameter.

    Some of torch's optimisers would raise in the middle of an update. Others would continue in the lower
    precision.

    Raises:
        ValueError: naming the dtypes and devices, with the lines that convert the state.
    """
    for p in parameters_of(optimizer):
        for key, value in optimizer.state.get(p, {}).items():
            if not isinstance(value, torch.Tensor) or value.shape != p.shape or not value.is_floating_point():
                continue
            if (value.dtype, value.device) != (p.dtype, p.device):
                raise ValueError(
                    f"optim: expected its {key} in {p.dtype} on {p.device}, as the parameters, got "
                    f"{value.dtype} on {value.device}: were they converted during training? To fix: convert "
                    "its state too, svi.optimizer.load_state_dict(svi.optimizer.state_dict())."
                )


# What torch's optimisers with a fused loop keep for each number of a parameter.
_RUNNING = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "sum")


def lay_out(optimizer: torch.optim.Optimizer) -> None:
    """Give gradients and running means the strides of their parameter, where a fused loop updates it.

    Torch's fused loops go through the memory of all of them side by side. They would pair the numbers of a
    transposed gradient with the wrong numbers of the parameter. They would write beyond the end of a smaller
    tensor.

    Raises:
        ValueError: if a parameter does not fill its memory, or has another shape than its gradient or running
            means.
    """
    for group in optimizer.param_groups:
        if group.get("fused"):
            for p in group["params"]:
                if p.grad is None:
                    continue
                if not _is_dense(p):
                    raise ValueError(
                        f"optim: expected parameters that fill their memory, got one of shape "
                        f"{tuple(p.shape)} with strides {p.stride()}, for which torch's fused loop would "
                        "update the wrong numbers. To fix: make the parameter from a clone, or use "
                        "fused=False."
                    )
                p.grad = _like(p, p.grad, "a gradient")
                state = optimizer.state.get(p, {})
                for key in _RUNNING:
                    if isinstance(state.get(key), torch.Tensor):
                        state[key] = _like(p, state[key], key)


def _is_dense(p: torch.Tensor) -> bool:
    """Return whether the numbers of a tensor fill its memory without gaps, in any order."""
    return p.is_contiguous() or torch.empty_like(p, device="meta").stride() == p.stride()


def _like(p: torch.nn.Parameter, tensor: torch.Tensor, what: str) -> torch.Tensor:
    if tensor.shape != p.shape:
        raise ValueError(
            f"optim: expected {what} of the shape of its parameter, {tuple(p.shape)}, got "
            f"{tuple(tensor.shape)}. To fix: make a new optimiser where a parameter has changed its shape; "
            "load a checkpoint of the same parameters, in the same order."
        )
    if tensor.stride() == p.stride() or tensor.layout != torch.strided:
        return tensor
    return torch.empty_like(p).copy_(tensor)
