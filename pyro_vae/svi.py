"""SVI: the interface of ``pyro.infer.SVI`` with parameters that belong to their modules."""

from collections.abc import Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
from pyro.infer import ELBO, ReweightedWakeSleep, TraceTailAdaptive_ELBO
from pyro.optim import PyroOptim
from pyro.optim.lr_scheduler import PyroLRScheduler

from pyro_vae.compiled.cpu.adam import FusedAdam
from pyro_vae.compiled.elbo import CompiledELBO
from pyro_vae.elbos.checks import check_pair, locate
from pyro_vae.elbos.kl_weight import active_weights
from pyro_vae.programs.observations import check_finite
from pyro_vae.programs.pair import (
    Before,
    Inside,
    Program,
    check_names,
    evaluating,
    own_parameters,
    parameters,
    rehearsal,
    signature,
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
            that is faster, and compiled beside a compiled loss (Adam).
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
        _check_loss(loss)
        self.model = model
        self.guide = guide
        self.loss: Any = loss
        self._stating = with_statements(model), with_statements(guide)
        self._recipe: PyroOptim | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        if isinstance(optim, torch.optim.Optimizer):
            _check_optimizer(optim)
            self._optimizer = optim
        else:
            _check_recipe(optim)
            self._recipe = optim
        # Of each signature that was checked: how many data its loss stands for, where a plate says.
        self._checked: dict[Hashable, int | None] = {}
        # An autoguide makes its parameters at its first use: then the first batch decides.
        if self._optimizer is not None or parameters(model, guide):
            self._check_trainable()

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The torch optimiser, which a learning-rate scheduler and a checkpoint take."""
        if self._optimizer is None:
            trained = parameters(self.model, self.guide)
            if not trained:
                raise ValueError(
                    "There is no optimiser yet, since model and guide have no trainable parameter. An "
                    "autoguide makes its own at its first use: run guide(*batch) once first."
                )
            compiled = isinstance(self.loss, CompiledELBO) and self.loss.backend == "inductor"
            self._optimizer = _as_torch(cast(PyroOptim, self._recipe), trained, compiled=compiled)
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
        before = Before(self.model, self.guide)
        trainable = before.inside.trainable()
        trained = self._adopt(trainable)
        for p in (*trained, *trainable):
            p.grad = None
        with self._guarded(before, args, kwargs):
            loss, known_finite = self._loss_and_grads(before.inside, args, kwargs)
            gradients = [p.grad for p in trained if p.grad is not None]
            if not known_finite:
                check_finite(loss, gradients)
            if not gradients:
                raise ValueError(
                    "No parameter of the optimiser has a gradient, so nothing would train. Expected "
                    "the loss to depend on one: look for detached tensors, torch.no_grad, or "
                    "parameters that model and guide do not use."
                )
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
            before = Before(self.model, self.guide)
            with self._guarded(before, args, kwargs), own_parameters(self.model, self.guide, validate=False):
                loss = float(self.loss.loss(self.model, self.guide, *args, **kwargs))
                check_finite(loss)
            return loss

    def num_data(self, *args: Any, **kwargs: Any) -> int:
        """Return how many data the loss of a batch stands for.

        The size of the model's plate "data": the length of the batch, or of the whole data set
        where the plate subsamples it. Without that plate, the length of the first tensor.
        """
        self._check(args, kwargs)
        num_data = self._checked[self._signature(args, kwargs)]
        if num_data is None:
            sized = [value for value in (*args, *kwargs.values()) if getattr(value, "shape", ())]
            if not sized:
                raise ValueError("Expected a batch with a tensor, whose length is the number of data.")
            num_data = len(sized[0])
        return num_data

    def _loss_and_grads(
        self, inside: Inside, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[float, bool]:
        """Add the gradients; return the loss and whether loss and gradients are known to be finite."""

        def own() -> AbstractContextManager[None]:
            return own_parameters(self.model, self.guide, validate=False)

        if type(self.loss) is CompiledELBO:
            return self.loss.step(*self._stating, inside, args, kwargs, own)
        with own():
            if hasattr(self.loss, "differentiable_loss"):
                loss = self.loss.differentiable_loss(self.model, self.guide, *args, **kwargs)
                if loss.requires_grad:
                    loss.backward()
                return float(loss.detach()), False
            return float(self.loss.loss_and_grads(*self._stating, *args, **kwargs)), False

    def _check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Check the pair on the first batch of a signature."""
        key = self._signature(args, kwargs)
        if key in self._checked:
            return
        check_names(self.model, self.guide)
        before = parameters(self.model, self.guide)
        held = [] if self._optimizer is None else _held(self._optimizer)
        with rehearsal(self.model, self.guide):
            elbo = getattr(self.loss, "elbo", self.loss)
            num_data = check_pair(self.model, self.guide, args, kwargs, elbo, held)
        new = {id(p) for p in parameters(self.model, self.guide)} - {id(p) for p in (*before, *held)}
        if new and self._recipe is None:
            raise ValueError(
                f"{len(new)} parameters were made at the first use of model and guide, after the "
                "optimiser, which does not hold them. Expected them in it: run guide(*batch) once before "
                "making the optimiser, or pass a PyroOptim."
            )
        self._check_trainable()
        self._checked[key] = num_data

    def _signature(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable:
        modes = tuple(getattr(program, "training", None) for program in (self.model, self.guide))
        # Whether latents are weighted decides what an ELBO can do; by how much does not.
        weighted = any(float(weight.beta) != 1 for weight in active_weights())
        # A float does not change the structure.
        return modes, weighted, signature((args, kwargs), floats_by_value=False)

    def _adopt(self, owned: list[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
        """Let the optimiser of a PyroOptim hold parameters that have appeared or thawed; return its own."""
        held = _held(self.optimizer)
        if self._recipe is not None:
            known = set(map(id, held))
            new = [p for p in owned if id(p) not in known]
            self.optimizer.param_groups[0]["params"].extend(new)
            held += new
        return held

    def _check_trainable(self) -> None:
        trainable = {id(p) for p in parameters(self.model, self.guide)}
        held = trainable if self._recipe is not None else set(map(id, _held(self.optimizer)))
        if not trainable & held:
            raise ValueError(
                "The optimiser holds no trainable parameter of this model and guide. Expected some "
                "of pyro_vae.parameters(model, guide): make the optimiser from them, and model and "
                "guide modules (or methods of modules) that own what they train."
            )

    @contextmanager
    def _guarded(self, before: Before, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """Leave all as it was where a run fails; name the site where a number is not finite."""
        try:
            yield
        except BaseException as error:  # an interrupt too
            for p in (*_held(self.optimizer), *parameters(self.model, self.guide)):
                p.grad = None
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


def _held(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _check_loss(loss: Any) -> None:
    single = isinstance(loss, ELBO) and not isinstance(loss, ReweightedWakeSleep | TraceTailAdaptive_ELBO)
    if not single:
        raise ValueError(
            "loss expects a Pyro ELBO whose loss is one number, such as Trace_ELBO(), got "
            f"{loss if isinstance(loss, type) else type(loss).__name__}."
        )
    if type(loss).__name__.startswith("Jit"):
        raise ValueError(
            f"loss expects an ELBO without Jit, got {type(loss).__name__}, whose gradients can be twice too "
            "large and which keeps its first model. Use the ELBO of the same name without Jit."
        )


def _check_optimizer(optim: torch.optim.Optimizer) -> None:
    if isinstance(optim, torch.optim.LBFGS):
        raise ValueError(
            "optim expects an optimiser that steps on a gradient, got LBFGS, which asks for the loss anew "
            "while it steps. Use torch.optim.Adam."
        )


def _check_recipe(optim: Any) -> None:
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


def _as_torch(
    optim: PyroOptim, trained: list[torch.nn.Parameter], *, compiled: bool
) -> torch.optim.Optimizer:
    """Make the one torch optimiser that a PyroOptim describes, fused where that is faster, or compiled."""
    make: Any = optim.pt_optim_constructor
    options: dict[str, Any] = {**cast(dict[str, Any], optim.pt_optim_args)}
    chosen = {"foreach", "fused", "differentiable"} & options.keys()
    fusible = not chosen and all(p.device.type in ("cpu", "cuda") for p in trained)
    if fusible and make is torch.optim.Adam and options.keys() <= {"lr", "betas", "eps", "weight_decay"}:
        return FusedAdam(trained, **options, compiled=compiled and all(p.is_cpu for p in trained))
    if fusible and make in (torch.optim.Adam, torch.optim.AdamW):
        options["fused"] = True
    optimizer: torch.optim.Optimizer = make(trained, **options)
    return optimizer
