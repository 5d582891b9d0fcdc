"""Generation: the likelihood of every observed site, given latents from the prior or from the guide."""

from collections.abc import Mapping
from numbers import Integral
from typing import Any, cast

from pyro import poutine
from pyro.distributions import Unit
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.infer import infer_discrete
from pyro.poutine import Trace
from pyro.poutine.condition_messenger import ConditionMessenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from torch import Tensor

from pyro_vae.arguments import require, whole_number
from pyro_vae.evaluation.checks import check_whole, refusing_train_mode
from pyro_vae.programs import Batch, Pair, Program, as_args, no_guide
from pyro_vae.programs.batches import check_not_empty, naming_the_batch
from pyro_vae.programs.dependencies import Dependencies
from pyro_vae.programs.names import check_param_statements, name_apart
from pyro_vae.programs.observations import check_values
from pyro_vae.programs.plates import find_layout
from pyro_vae.programs.traces import (
    Site,
    is_plate,
    latent_sites,
    observed_sites,
    refuse_unobserved,
    sample_sites,
)


def generate(
    model: Program, batch: Batch | int, *, given: Mapping[str, Tensor] | None = None
) -> dict[str, TorchDistribution]:
    """Draw latents from the prior and return the likelihood of every observed site.

    ``generate(model, x)["x"].sample()`` are new images, ``.mean`` their expectations given z.
    ``generate(model, (x, y), given={"y": y})`` are images of the classes y, and
    ``generate(model, len(z), given={"z": z})`` those at the latents z.

    A site that the model observes by ``obs=`` is drawn instead. A value that is given, or conditioned on by
    ``pyro.condition``, is kept.

    Args:
        model: any model.
        batch: the model's arguments, which say how many to generate. If the model uses only ``len(x)`` or
            takes a number, the number is enough.
        given: site name -> its value, with the batch and event shape of the site.

    Returns:
        Site name -> p(x | z), z ~ p(z), for every observed site that is not given.

    Raises:
        ValueError: if the model observes nothing, or has a ``pyro.param`` statement outside a module; if a
            given site is not in the model, or its values do not fit; if nothing is left to generate; if a
            number is not enough. Also if another site depends on an observed site that is not given: its
            observed values would be lost.
    """
    require(
        given is None or isinstance(given, Mapping),
        "given",
        "a dict, site name -> tensor",
        type(given).__name__,
        "pass one such as {'z': z}",
    )
    given = dict(given or {})
    draws = _DrawObserved()
    pair = Pair(model, no_guide, ()).wrapped(model=draws(poutine.condition(model, data=given)))
    name_apart(pair.modules)
    with pair.evaluating(), pair.isolated(validate=False), refusing_train_mode(pair):
        if isinstance(batch, Integral):
            pair, trace = _trace_of_size(pair, whole_number("batch", batch, 1, "pass 16, for 16 draws"))
        else:
            pair = pair.on(as_args(cast(Batch, batch)))
            check_not_empty(pair)
            with naming_the_batch("model", pair):
                trace = pair.trace_model()
        check_param_statements(pair, trace)
        sites = dict(sample_sites(trace))
        if unknown := given.keys() - sites:
            raise ValueError(
                f"given: expected sites of the model, {sorted(sites)}, got {sorted(unknown)}. To fix: use "
                "the names of the model's pyro.sample statements."
            )
        _check_nothing_lost(pair, draws.drawn & sites.keys())
    generated = {
        name: site["fn"]
        for name, site in sites.items()
        if site["infer"].get("was_observed") and not isinstance(site["fn"], Unit)
    }
    if not generated:
        if not any(site["is_observed"] for site in sites.values()):
            refuse_unobserved(trace)
        raise ValueError(
            f"The model: expected an observed site to generate, got {sorted(sites)}: none of them is "
            "observed by obs= and left to draw. To fix: observe the data in the model, and give fewer sites."
        )
    return generated


class _DrawObserved(UnconditionMessenger):
    """Draws each site that the model observes by ``obs=``, and keeps and checks what is conditioned on.

    Attributes:
        drawn: the sites that were observed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.drawn: set[str] = set()

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] and not _is_conditioned(msg["name"]):
            super()._pyro_sample(msg)
            self.drawn.add(msg["name"])

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["is_observed"] and not is_plate(msg):
            _check_given(msg["name"], msg)


def _is_conditioned(name: str) -> bool:
    # Handlers inside of this one act first, so the message does not say where the value is from.
    return any(isinstance(handler, ConditionMessenger) and name in handler.data for handler in _PYRO_STACK)


def _check_given(name: str, site: Site) -> None:
    """Refuse a given value that does not have the shape of a draw, or is outside the support."""
    shape, given = tuple(site["fn"].shape()), tuple(getattr(site["value"], "shape", ()))
    if given != shape or not isinstance(site["value"], Tensor):
        raise ValueError(
            f"Site '{name}', which is given: expected a tensor of shape {shape}, a value for each data "
            f"point, got {f'shape {given}' if given else repr(site['value'])}. To fix: use expand, or "
            "generate as many as are given."
        )
    check_values(name, site)


def _check_nothing_lost(pair: Pair, drawn: set[str]) -> None:
    """Refuse to draw an observed site on which another one depends, since that one would not fit the draw."""
    if len(drawn) > 1:
        dependencies = Dependencies(pair.model, pair.args, pair.kwargs, drawn)
        for name in sorted(drawn):
            if doubt := dependencies.doubt(name):
                raise ValueError(
                    f"Site '{name}' of the model: expected to see which sites it depends on, since generate "
                    f"drops what other sites observe, but {doubt} hides it. To fix: give the sites that it "
                    "depends on, given={...}; poutine.uncondition(model) draws all."
                )
            if lost := sorted(dependencies.ancestors(name) & drawn):
                raise ValueError(
                    f"Site '{lost[0]}' of the model: expected it to be given, since '{name}' depends on it "
                    "and generate would drop the values that it observes, got an observation. To fix: "
                    f"given={{'{lost[0]}': ...}} holds them; poutine.uncondition(model) draws them too."
                )


class _OfLength:
    """Stands for data of which only the number is known. It is an error to read anything else of it."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __len__(self) -> int:
        return self._number

    def size(self, dim: int) -> int:
        return {0: self._number}[dim]

    @property
    def shape(self) -> "_Shape":
        return _Shape(self._number)


class _Shape:
    """The shape of which only the first dimension is known. A tuple would also be shape[-1]."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __getitem__(self, dim: int) -> int:
        return {0: self._number}[dim]


def _trace_of_size(pair: Pair, number: int) -> tuple[Pair, Trace]:
    """Trace a model of which only the number of data is known; return it on its arguments, and the trace."""
    fix = f"To fix: pass a batch, generate(model, x[:{number}])."
    try:
        sized = pair.on((number,))  # a model that takes a number
        trace = sized.trace_model()
    except (TypeError, AttributeError):
        try:
            sized = pair.on((_OfLength(number),))
            trace = sized.trace_model()
        except Exception as error:  # a model may do anything with data
            reason = str(error)
            if isinstance(error, ValueError) and _OfLength.__name__ not in reason:
                raise
            raise ValueError(
                "batch: expected data, since this program reads them, got only their number, "
                f"{number}. {fix} If you passed a guide, pass the model."
            ) from error
    for name, site in sample_sites(trace):
        if site["infer"].get("was_observed") and number not in site["fn"].batch_shape:
            raise ValueError(
                f"Site '{name}': expected {number} of it, as many as to generate, got batch shape "
                f"{tuple(site['fn'].batch_shape)}. {fix}"
            )
    return sized, trace


def reconstruct(model: Program, guide: Program, batch: Batch) -> dict[str, TorchDistribution]:
    """Draw latents from the guide and return the likelihood of every observed site.

    ``reconstruct(model, guide, x)["x"].mean`` is E[x' | z] with z ~ q(z | x). A site k that the model
    enumerates and the guide leaves out is drawn from p(k | x, z).

    Args:
        model: any model.
        guide: its guide.
        batch: their arguments.

    Returns:
        Site name -> p(x' | z), z ~ q(z | x).

    Raises:
        ValueError: if the batch does not fit, or an autoguide holds the posteriors of other data.
    """
    pair = Pair(model, guide, as_args(batch))
    with pair.evaluating():
        check_whole(pair)
        with pair.isolated(validate=False):
            layout = find_layout(pair, particles=False)
            model_trace, guide_trace = pair.trace()
            if layout.sums_out:
                z = {name: site["value"] for name, site in latent_sites(guide_trace).items()}
                drawn = infer_discrete(poutine.condition(model, data=z), -1 - layout.max_plate_nesting)
                model_trace = pair.wrapped(model=drawn).trace_model()
    drawn_by_guide = latent_sites(guide_trace)
    observed = observed_sites(model_trace).items()
    return {name: site["fn"] for name, site in observed if name not in drawn_by_guide}
