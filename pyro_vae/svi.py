"""SVI: the interface of ``pyro.infer.SVI``, with parameters that belong to their modules."""

import signal
import warnings
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from pyro.infer import ELBO
from pyro.optim import PyroOptim

from pyro_vae.elbos.capabilities import check_elbo, inner_elbo
from pyro_vae.elbos.checks import check_pair
from pyro_vae.elbos.kl_weight import active_weights
from pyro_vae.interrupts import deferred
from pyro_vae.optimiser import (
    as_torch,
    check_optimizer,
    check_recipe,
    check_state,
    lay_out,
    parameters_of,
)
from pyro_vae.programs import Pair, PairCache, Program
from pyro_vae.programs.faults import locate
from pyro_vae.programs.names import name_apart
from pyro_vae.programs.observations import check_finite
from pyro_vae.programs.one_thread import one_thread
from pyro_vae.programs.pair import functions_around_modules, no_guide
from pyro_vae.programs.snapshot import Snapshot


class SVI:
    """Stochastic variational inference: maximise an ELBO over the parameters of model and guide.

    A step draws from the guide, differentiates the loss and updates every trainable parameter::

        svi = SVI(model, guide, torch.optim.Adam(parameters(model, guide), lr=1e-3), loss=Trace_ELBO())
        loss = svi.step(x)

    It differs from ``pyro.infer.SVI`` in three ways. Parameters live only in their modules. So two pairs
    train side by side, and ``model.state_dict()`` holds everything. One torch optimiser updates all
    parameters. A step that would train nothing, or give a wrong number, is an error. It leaves parameters,
    buffers, optimiser and random state as they were.

    For the same seed, the losses are those of ``pyro.infer.SVI``, unless its first step draws more numbers.
    It draws more to guess the plates of an ELBO that enumerates or vectorises particles: give the ELBO its
    ``max_plate_nesting``. It also draws more to initialise an autoguide: run the guide once before you set
    the seed. Here, neither changes the random state.

    The first batch of each signature (shapes, dtypes, devices, train or eval mode, frozen parameters) is
    checked in full. After that the steps run without Pyro's validation. This package's families are -inf
    outside their support, and any non-finite loss or gradient stops the step. But your own distribution may
    have a finite log probability outside its support. Such a value passes.

    Args:
        model: a module, or a method of one, that makes Pyro statements.
        guide: a module, or a method of one, that draws the model's latents.
        optim: a torch optimiser over (some of) the pair's :func:`~pyro_vae.parameters`, or a
            PyroOptim with its arguments in a dict. The latter becomes one torch optimiser at the first step,
            fused where that is faster. From then on it belongs to this SVI.
        loss: a Pyro ``ELBO``, for example ``Trace_ELBO()``. SVI uses its ``differentiable_loss`` if it has
            one, else its ``loss_and_grads``.

    Raises:
        ValueError: if there is nothing to train, or ``optim`` or ``loss`` is of another kind.

    Warns:
        UserWarning: at the first step, if ``optim`` holds no parameter of the model, or none of the guide; if
            a likelihood on the real line observes what looks like 8-bit grey levels.

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
        check_elbo("loss", loss)
        self.model = model
        self.guide = guide
        self.loss: Any = loss
        self._recipe: PyroOptim | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        if isinstance(optim, torch.optim.Optimizer):
            check_optimizer(optim)
            self._optimizer = optim
        else:
            check_recipe(optim)
            self._recipe = optim
        # For each checked signature: the number of data points that its loss stands for, if it is known.
        self._checked: PairCache[int | None] = PairCache()
        self._knows_sides = False  # whether both sides train, since the last new signature
        # An autoguide makes its parameters at its first use: then the first batch decides.
        pair = Pair(model, guide)
        name_apart(pair.modules, take=True)
        if self._optimizer is not None or pair.trainable:
            self._check_trainable(pair)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The torch optimiser, for a learning-rate scheduler or a checkpoint."""
        if self._optimizer is None:
            trainable = Pair(self.model, self.guide).trainable
            if not trainable:
                raise ValueError(
                    "optimizer: expected a trainable parameter in model or guide, got none yet. To fix: run "
                    "guide(*batch) once first, where an autoguide makes its parameters at its first use."
                )
            recipe = cast(PyroOptim, self._recipe)
            check_recipe(recipe)  # another SVI may have taken it in the meantime
            self._optimizer = as_torch(recipe, trainable)
        return self._optimizer

    @one_thread
    def step(self, *args: Any, **kwargs: Any) -> float:
        """Take one gradient step on a batch and return its loss before the step.

        Args:
            *args: a batch: the positional arguments of model and guide.
            **kwargs: keyword arguments of model and guide.

        Returns:
            The loss in nats, summed over the batch and scaled by the model's plates. If the pair makes no
            sample statement for a batch, the loss is 0 and nothing is updated.

        Raises:
            ValueError: if the batch does not fit, or the loss or a gradient is not finite, or no
                gradient reaches the optimiser. Then nothing changes.
            RuntimeError: if another thread runs a pair at the same time; then nothing changes. Also if the
                optimiser or a hook on its step raises; then some parameters may be updated.
            KeyboardInterrupt: if Ctrl-C is pressed. It comes before the update, and nothing changes, or
                after the whole update.
        """
        loss = self._step(args, kwargs, None)
        return 0.0 if loss is None else float(loss)

    @one_thread
    def _launch(self, skip: torch.Tensor, args: tuple[Any, ...]) -> torch.Tensor:
        """Take one gradient step without waiting for the device, under a CompiledELBO and a fused optimiser.

        If ``skip``, a float32 of shape (), is 1, the optimiser skips the update. It becomes 1 if the loss or
        a gradient is not finite.

        Returns:
            The loss in nats, (), on the device.
        """
        loss = self._step(args, {}, skip)
        return torch.zeros_like(skip) if loss is None else loss

    def _step(self, args: tuple[Any, ...], kwargs: dict[str, Any], skip: torch.Tensor | None) -> Any:
        """Take a step; return its loss, or None without a sample statement. With ``skip``, do not wait."""
        pair, num_data = self._checked_pair(args, kwargs)
        if num_data == 0:
            return None
        before = pair.snapshot()
        optimised = self._optimised(pair)
        if not self._knows_sides:
            self._warn_of_untrained_sides(optimised)
            self._knows_sides = True
        for p in (*optimised, *pair.trainable):
            p.grad = None
        with self._guarded(pair, before):
            loss, known_finite = self._loss_and_grads(pair)
            gradients = [p.grad for p in optimised if p.grad is not None]
            if skip is not None:
                skip.masked_fill_(~known_finite, 1.0)
            elif not known_finite:
                check_finite(loss, gradients)
            if not gradients:
                raise ValueError(
                    "The loss: expected it to depend on a parameter of the optimiser, got none with a "
                    "gradient, so nothing would train. To fix: look for detached tensors, torch.no_grad, or "
                    "parameters that model and guide do not use."
                )
            lay_out(self.optimizer)
        with deferred(signal.SIGINT) as request:
            try:
                self._update(skip)
            finally:
                request.obey()
        return loss

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """Return the loss of a batch, in eval mode and without gradients.

        It changes only the random state. Parameters, optimiser and BatchNorm's statistics stay as they were.

        Args:
            *args: a batch: the positional arguments of model and guide.
            **kwargs: keyword arguments of model and guide.

        Returns:
            The loss in nats, summed over the batch.

        Raises:
            ValueError: if the batch does not fit or the loss is not finite.
        """
        with Pair(self.model, self.guide).evaluating():
            pair, num_data = self._checked_pair(args, kwargs)
            if num_data == 0:
                return 0.0
            with self._guarded(pair, pair.snapshot()), pair.isolated(validate=False):
                loss = float(self.loss.loss(self.model, self.guide, *args, **kwargs))
                check_finite(loss)
            return loss

    def num_data(self, *args: Any, **kwargs: Any) -> int:
        """Return the number of data points that the loss of a batch stands for.

        It is the size of their plate: the length of the batch, or of the whole data set where the plate
        subsamples it. The plate is the one named "data", else the only one that holds every site. If other
        sites are outside all plates, it is the only one that holds every observed site. Without any plate, it
        is the length of the first tensor. If the pair makes no sample statement, it is 0.

        Raises:
            ValueError: if several plates may be the plate of the data, or nothing has a length.
        """
        _, num_data = self._checked_pair(args, kwargs)
        if num_data is None:
            raise ValueError(
                "The batch: expected one plate around every site, or a tensor and no plates, to find the "
                "number of data points, got neither. To fix: rename the plate of the data to 'data', as in "
                "pyro.plate('data', num_data)."
            )
        return num_data

    def _optimised(self, pair: Pair) -> list[torch.nn.Parameter]:
        """Return the optimiser's parameters. One from a PyroOptim first takes new and unfrozen ones."""
        optimised = parameters_of(self.optimizer)
        if self._recipe is not None:
            known = set(map(id, optimised))
            new = [p for p in pair.trainable if id(p) not in known]
            self.optimizer.param_groups[0]["params"].extend(new)
            optimised += new
        return optimised

    def __getstate__(self) -> dict[str, Any]:
        # For copy.deepcopy and pickle.
        for function in functions_around_modules(self.model, self.guide):
            raise ValueError(
                "A copy of SVI: expected model and guide that Python copies, got the function "
                f"'{function.__name__}' around a module. Python copies a function as itself, so the copy "
                "would train the original's parameters. To fix: make it a method of a module."
            )
        return vars(self).copy()

    def _checked_pair(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Pair, int | None]:
        """Return the pair on a batch, checked if its signature is new, and its number of data points."""
        pair = Pair(self.model, self.guide, args, kwargs)
        key = _signature(pair)
        checked = self._checked.results(pair)
        if key in checked:
            return pair, checked[key]
        optimised = [] if self._optimizer is None else parameters_of(self._optimizer)
        if self._optimizer is not None:
            check_state(self._optimizer)
        with pair.trial():
            num_data = check_pair(pair, inner_elbo(self.loss), optimised)
        known = {id(p) for p in (*pair.trainable, *optimised)}
        pair = Pair(self.model, self.guide, args, kwargs)  # a first run may have made parameters
        new = [p for p in pair.trainable if id(p) not in known]
        if new and self._recipe is None:
            raise ValueError(
                f"optim: expected all parameters of model and guide, got an optimiser that lacks {len(new)} "
                "of them, which were made at the first use of the pair. To fix: run guide(*batch) once "
                "before making the optimiser, or pass a PyroOptim."
            )
        self._check_trainable(pair)
        self._checked.add(pair, _signature(pair), num_data)
        self._knows_sides = False
        return pair, num_data

    def _update(self, skip: torch.Tensor | None) -> None:
        optimizer: Any = self.optimizer
        try:
            if skip is not None:
                optimizer.found_inf = skip
            optimizer.step()
        except Exception as error:
            name = type(self.optimizer).__name__
            raise RuntimeError(
                f"optim: expected {name}.step() and the hooks on it to finish, got {type(error).__name__}: "
                f"{error}. Some parameters may be updated, others not. To fix: remove the cause of the "
                "error, and resume from the last checkpoint."
            ) from error
        finally:
            if skip is not None:
                del optimizer.found_inf

    def _loss_and_grads(self, pair: Pair) -> tuple[Any, Any]:
        """Add the gradients; return the loss, and whether loss and gradients are known to be finite."""
        # A CompiledELBO runs a graph, without Pyro. A subclass may have its own loss_and_grads.
        if "add_gradients" in vars(type(self.loss)):
            return cast(Any, self.loss).add_gradients(pair)
        with pair.isolated(validate=False):
            if hasattr(self.loss, "differentiable_loss"):
                loss = self.loss.differentiable_loss(pair.model, pair.guide, *pair.args, **pair.kwargs)
                if loss.requires_grad:
                    loss.backward()
                return float(loss.detach()), False
            stating = pair.with_module_statements()
            return float(
                self.loss.loss_and_grads(stating.model, stating.guide, *pair.args, **pair.kwargs)
            ), False

    def _check_trainable(self, pair: Pair) -> None:
        trainable = {id(p) for p in pair.trainable}
        optimised = trainable if self._recipe is not None else set(map(id, parameters_of(self.optimizer)))
        if not trainable & optimised:
            raise ValueError(
                "optim: expected an optimiser with trainable parameters of this model and guide, got one "
                "that holds none of them. To fix: make it from pyro_vae.parameters(model, guide), and make "
                "model and guide modules (or methods of modules) that own what they train."
            )

    def _warn_of_untrained_sides(self, optimised: list[torch.nn.Parameter]) -> None:
        for side, program in (("model", self.model), ("guide", self.guide)):
            own = set(map(id, Pair(program, no_guide).trainable))
            if own and own.isdisjoint(map(id, optimised)):
                warnings.warn(
                    f"optim: got an optimiser without a parameter of the {side}, so the {side} does "
                    "not train. To fix: make it from pyro_vae.parameters(model, guide). If you mean it, "
                    f"freeze the {side}, {side}.requires_grad_(False).",
                    stacklevel=4,
                )

    @contextmanager
    def _guarded(self, pair: Pair, before: Snapshot) -> Iterator[None]:
        """Restore everything if a run fails; name the site where a number is not finite."""
        try:
            yield
        except BaseException as error:  # an interrupt too
            optimised = [] if self._optimizer is None else parameters_of(self._optimizer)
            for p in (*optimised, *Pair(self.model, self.guide).trainable):
                p.grad = None
            before.restore()
            # Pyro warns of a NaN before the loss is checked, and a warning may be an error.
            warned = isinstance(error, UserWarning) and str(error).startswith("Encountered")
            if not (warned or isinstance(error, FloatingPointError)):
                raise
            try:
                message = locate(pair, "The loss is NaN" if warned else str(error))
            finally:
                before.restore()
            raise ValueError(message) from error


def _signature(pair: Pair) -> Hashable:
    # What an ELBO can do depends on whether latents are weighted, not on the weight.
    weights = [weight.number() for weight in active_weights(pair.model, pair.guide)]
    return any(weight != 1 for weight in weights), pair.signature()
