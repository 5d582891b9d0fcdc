"""SVI: the interface of ``pyro.infer.SVI`` with parameters that belong to their modules."""

import inspect
import math
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from pyro.infer import ELBO
from pyro.optim import PyroOptim
from pyro.optim.lr_scheduler import PyroLRScheduler
from torch import Tensor

from pyro_vae.diagnostics import check_pair, locate
from pyro_vae.pairs import (
    Before,
    Program,
    check_names,
    evaluating,
    own_parameters,
    parameters,
    rehearsal,
    with_statements,
)


class SVI:
    """Stochastic variational inference: maximise an ELBO over the parameters of model and guide.

    A step draws from the guide, differentiates the loss and updates every trainable parameter::

        svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), loss=Trace_ELBO())
        loss = svi.step(x)

    Where it differs from ``pyro.infer.SVI``: parameters live in their modules and nowhere else, so
    two pairs train side by side and ``model.state_dict()`` is the whole truth; one torch optimiser
    serves all parameters; and what would train nothing, or give a wrong number, is an error that
    leaves parameters, buffers, optimiser and random state as they were. Losses are the same for the
    same seed.

    The first batch of each signature (shapes, dtypes, devices, train or eval mode) is checked
    in full. After that the steps run without Pyro's validation: this package's families are -inf
    outside their support and any non-finite loss or gradient stops the step, but a value outside
    the support of a distribution of your own that still has a finite log probability passes.

    Args:
        model: a module, or a method of one, that makes Pyro statements.
        guide: likewise.
        optim: a torch optimiser over (some of) the pair's :func:`~pyro_vae.parameters`, or a
            PyroOptim with its arguments in a dict, which becomes one torch optimiser, fused where
            torch offers it.
        loss: a Pyro ``ELBO``, for example ``Trace_ELBO()``; its ``differentiable_loss`` is used
            where it has one, else its ``loss_and_grads``.

    Raises:
        ValueError: if there is nothing to train, or ``optim`` or ``loss`` is of another kind.

    References:
        Hoffman et al. 2013, arXiv 1206.7051; Kingma and Welling 2013, arXiv 1312.6114.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        optim: torch.optim.Optimizer | PyroOptim,
        loss: ELBO,
    ) -> None:
        if not (hasattr(loss, "differentiable_loss") or hasattr(loss, "loss_and_grads")):
            raise ValueError(f"loss expects a Pyro ELBO, such as Trace_ELBO(), got {loss!r}.")
        self.model = model
        self.guide = guide
        self.loss: Any = loss
        self._num_data: dict[Hashable, int | None] = {}
        self._recipe: PyroOptim | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        if isinstance(optim, torch.optim.Optimizer):
            self._optimizer = optim
        else:
            self._recipe = _checked_recipe(optim)
        # An autoguide makes its parameters at its first use: then the first batch decides.
        if self._optimizer or parameters(model, guide):
            self._check_trainable()

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The torch optimiser, which a learning-rate scheduler and a checkpoint take."""
        if self._optimizer is None:
            assert self._recipe is not None
            self._optimizer = _as_torch(self._recipe, parameters(self.model, self.guide))
        return self._optimizer

    def step(self, *args: Any, **kwargs: Any) -> float:
        """Take one gradient step on a batch and return its loss before the step.

        Args:
            *args: a batch, as model and guide take it.
            **kwargs: likewise.

        Returns:
            The loss in nats, summed over the batch (scaled as the model's plates say).

        Raises:
            ValueError: if the batch does not fit, or the loss or a gradient is not finite, or no
                gradient reaches the optimiser. Nothing is changed then.
        """
        self._check(args, kwargs)
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        self._drop_gradients()
        with self._guarded(args, kwargs):
            loss = self._loss_and_grads(args, kwargs)
            gradients = [p.grad for p in trained if p.grad is not None]
            if not math.isfinite(loss):
                raise FloatingPointError(f"The loss is {loss}")
            if not gradients:
                raise ValueError(
                    "No parameter of the optimiser has a gradient, so nothing would train. Expected "
                    "the loss to depend on one: look for detached tensors, torch.no_grad, or "
                    "parameters that model and guide do not use."
                )
            if not _all_finite(gradients):
                raise FloatingPointError("A gradient is not finite")
        self.optimizer.step()
        return loss

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """Return the loss of a batch, in eval mode and without gradients.

        It moves nothing but the random state: not the parameters, not the optimiser, not
        BatchNorm's statistics.

        Args:
            *args: a batch, as model and guide take it.
            **kwargs: likewise.

        Returns:
            The loss in nats, summed over the batch.

        Raises:
            ValueError: if the batch does not fit or the loss is not finite.
        """
        with evaluating(self.model, self.guide):
            self._check(args, kwargs)
            with self._guarded(args, kwargs):
                loss = float(self.loss.loss(self.model, self.guide, *args, **kwargs))
                if not math.isfinite(loss):
                    raise FloatingPointError(f"The loss is {loss}")
            return loss

    def num_data(self, *args: Any, **kwargs: Any) -> int:
        """Return how many data the loss of a batch stands for.

        The size of the model's plate "data": the length of the batch, or of the whole data set
        where the plate subsamples it. Without that plate, the length of the first tensor.
        """
        self._check(args, kwargs)
        num_data = self._num_data[self._signature(args, kwargs)]
        if num_data is None:
            num_data = next(len(arg) for arg in args if isinstance(arg, Tensor) and arg.dim())
        return num_data

    def _loss_and_grads(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
        if hasattr(self.loss, "differentiable_loss"):
            loss = self.loss.differentiable_loss(self.model, self.guide, *args, **kwargs)
            if loss.requires_grad:
                loss.backward()
            return float(loss.detach())
        model, guide = with_statements(self.model), with_statements(self.guide)
        return float(self.loss.loss_and_grads(model, guide, *args, **kwargs))

    def _check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Check the pair on the first batch of a signature."""
        signature = self._signature(args, kwargs)
        if signature in self._num_data:
            return
        check_names(self.model, self.guide)
        with rehearsal(self.model, self.guide):
            num_data = check_pair(self.model, self.guide, args, kwargs)
        self._check_trainable()
        self._num_data[signature] = num_data

    def _signature(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable:
        modes = tuple(getattr(program, "training", None) for program in (self.model, self.guide))
        return modes, _signature(args), _signature(kwargs)

    def _check_trainable(self) -> None:
        trainable = parameters(self.model, self.guide)
        held = (
            {id(p) for group in self.optimizer.param_groups for p in group["params"]}
            if trainable
            else set()
        )
        missing = [p for p in trainable if id(p) not in held]
        if self._recipe and missing and trainable:
            # Pyro makes some parameters at their first use; a PyroOptim trains them all.
            self.optimizer.add_param_group({"params": missing})
        elif len(missing) == len(trainable):
            raise ValueError(
                "The optimiser holds no trainable parameter of this model and guide. Expected some "
                "of pyro_vae.parameters(model, guide): make the optimiser from them, and model and "
                "guide modules (or methods of modules) that own what they train."
            )

    @contextmanager
    def _guarded(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """Leave all as it was where a run fails; name the site where a number is not finite."""
        before = Before(self.model, self.guide)
        try:
            with own_parameters(self.model, self.guide, validate=False):
                yield
        except Exception as error:
            self._drop_gradients()
            before.restore()
            # Pyro warns of a NaN before the loss is here to be looked at; a warning may be an error.
            warned = isinstance(error, UserWarning) and str(error).startswith("Encountered")
            if not (warned or isinstance(error, FloatingPointError)):
                raise
            try:
                what = "The loss is NaN" if warned else str(error)
                message = locate(self.model, self.guide, args, kwargs, what)
            finally:
                before.restore()
            raise ValueError(message) from error

    def _drop_gradients(self) -> None:
        self.optimizer.zero_grad()
        for p in parameters(self.model, self.guide):
            p.grad = None


def _all_finite(tensors: list[Tensor]) -> bool:
    # The sum is finite where they are, and costs a sixth of asking each number; a sum of finite
    # numbers that overflows is asked again.
    total = torch.stack([tensor.sum() for tensor in tensors]).sum()
    return bool(total.isfinite()) or all(bool(tensor.isfinite().all()) for tensor in tensors)


def _signature(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.device
    if isinstance(value, dict):
        return tuple((key, _signature(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return tuple(_signature(item) for item in value)
    return value if isinstance(value, Hashable) else str(type(value))


def _checked_recipe(optim: Any) -> PyroOptim:
    """Refuse what one torch optimiser cannot do for a PyroOptim."""
    if not isinstance(optim, PyroOptim) or isinstance(optim, PyroLRScheduler):
        raise ValueError(
            "optim expects a torch optimiser, or a PyroOptim such as pyro.optim.Adam with its "
            f"arguments in a dict, got {type(optim).__name__}. For a learning-rate schedule make a "
            "torch.optim.lr_scheduler of svi.optimizer and pass it to fit(..., scheduler=...)."
        )
    if callable(optim.pt_optim_args):
        raise ValueError(
            "optim expects a PyroOptim with its arguments in a dict, got a callable. For arguments "
            "of each parameter's own pass a torch optimiser with parameter groups."
        )
    if optim.pt_clip_args:
        raise ValueError(
            f"optim expects a PyroOptim that does not clip, got {optim.pt_clip_args}. Pass a torch "
            "optimiser and clip by torch.nn.utils.clip_grad_norm_ in a hook of it "
            "(register_step_pre_hook)."
        )
    if optim.optim_objs or optim._state_waiting_to_be_consumed:
        raise ValueError(
            "optim expects a fresh PyroOptim, got one that holds the state of earlier steps, which "
            "would be dropped. Load a torch state with svi.optimizer.load_state_dict(...)."
        )
    return optim


def _as_torch(optim: PyroOptim, trained: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Make the one torch optimiser that a PyroOptim describes, fused where torch offers it."""
    make: Any = optim.pt_optim_constructor
    options: dict[str, Any] = {**cast(dict[str, Any], optim.pt_optim_args)}
    chosen = {"foreach", "fused", "differentiable"} & options.keys()
    if "fused" in inspect.signature(make).parameters and not chosen:
        options["fused"] = all(p.device.type in ("cpu", "cuda") for p in trained)
    optimizer: torch.optim.Optimizer = make(trained, **options)
    return optimizer
