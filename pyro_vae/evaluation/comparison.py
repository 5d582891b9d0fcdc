"""compare_elbos: estimators of a bound side by side; their values, the noise of their gradients, their cost.

A draw of an estimator is one step of :class:`~pyro_vae.SVI` with an optimiser that steps nowhere: so it is
checked, and costs, what a training step does. All draws are of one batch: the noise told here is the
estimator's own, without that of choosing the data.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from pyro.infer import ELBO
from torch import Tensor, nn

from pyro_vae.programs import Batch, Pair, Program, as_args, parameters
from pyro_vae.programs.snapshot import Snapshot
from pyro_vae.svi import SVI

Loss = Callable[..., Tensor]  # (model, guide, *batch) -> the loss in nats, differentiable


class Comparison(NamedTuple):
    """Estimators side by side: ``print(comparison)``, or ``pandas.DataFrame(comparison.records)``.

    A record stands for an estimator and a group of parameters. Its fields are plain numbers and strings;
    what was not asked for, or cannot be told, is None.

    ========================= =====================================================================
    field                     meaning
    ========================= =====================================================================
    estimator                 its name
    particles                 its ``num_particles``
    value, value_error        the bound, minus the loss, in nats a datum, and its standard error
    value_sd                  the standard deviation of a single draw of it
    gap, gap_error            log p(x) - value, in nats a datum, and the error of the value
    bias, bias_error          value - the target's value, in nats a datum
    ms                        median milliseconds of loss and gradients
    group                     the name of a group of parameters
    gradient_variance         of the loss a datum, summed over the group: the trace of its covariance
    snr                       signal-to-noise ratio: abs(E g) / sd g, averaged over the group's parameters
    snr_per_root_second       snr / sqrt(seconds): the snr of a second's worth of draws, averaged
    gradient_bias             norm(mean gradient - target's) / norm(target's), None where that is 0
    gradient_bias_error       what noise alone makes of gradient_bias, in root mean square
    ========================= =====================================================================

    Attributes:
        records: a dict for every estimator and group.
        num_draws: gradients drawn of every estimator.
        num_data: how many data the loss stands for, by which it is divided.
        evidence: log p(x) as it was passed, in nats a datum, or None.
    """

    records: list[dict[str, Any]]
    num_draws: int
    num_data: int
    evidence: float | None

    @property
    def snr_floor(self) -> float:
        """What so many draws show for the snr where there is no signal, sqrt(2 / (pi num_draws))."""
        return math.sqrt(2 / (math.pi * self.num_draws))

    def __str__(self) -> str:
        evidence = "" if self.evidence is None else f"; log p(x) = {self.evidence:.3f}"
        groups = list(dict.fromkeys(record["group"] for record in self.records))
        lines = [
            f"nats a datum, {self.num_data} data, {self.num_draws} draws of each{evidence}",
            *_table(self._of(groups[0]), _VALUE),
        ]
        for group in groups:
            lines += ["", f"gradient of the loss a datum, {group}", *_table(self._of(group), _GRADIENT)]
        lines += [
            "",
            "+- is a standard error; of a gradient's bias, what noise alone makes of it.",
            f"SNR is |E g| / sd g, averaged over parameters: noise alone shows {self.snr_floor:.3f}.",
        ]
        return "\n".join(lines)

    def _of(self, group: str) -> list[dict[str, Any]]:
        return [record for record in self.records if record["group"] == group]


# field: its header in print
_VALUE = {
    "estimator": "estimator",
    "particles": "particles",
    "value": "value",
    "value_sd": "sd of a draw",
    "gap": "gap to log p(x)",
    "bias": "bias",
    "ms": "ms",
}
_GRADIENT = {
    "estimator": "estimator",
    "particles": "particles",
    "snr": "SNR",
    "snr_per_root_second": "SNR/sqrt(s)",
    "gradient_variance": "variance",
    "gradient_bias": "relative bias",
}


def _table(records: list[dict[str, Any]], headers: dict[str, str]) -> list[str]:
    columns = [[header, *(_cell(r, field) for r in records)] for field, header in headers.items()]
    told = [column for column in columns if any(column[1:])]
    widths = [max(map(len, column)) for column in told]
    return [
        "  ".join([name.ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells, widths[1:], strict=True))])
        for name, *cells in zip(*told, strict=True)
    ]


def _cell(record: dict[str, Any], field: str) -> str:
    value, error = record[field], record.get(f"{field}_error")
    if value is None:
        return ""
    if isinstance(value, int | str):
        return str(value)
    return f"{value:.4g}" if error is None else f"{value:.3f} +- {error:.3f}"


def compare_elbos(
    model: Program,
    guide: Program,
    batch: Batch,
    estimators: Mapping[str, ELBO],
    num_draws: int = 100,
    *,
    evidence: float | Tensor | None = None,
    targets: Mapping[str, Loss] | None = None,
    groups: Mapping[str, nn.Module | Iterable[nn.Parameter]] | None = None,
    seed: int = 0,
) -> Comparison:
    """Draw the loss and the gradient of every estimator many times on one batch, and compare them.

    ::

        estimators = {"MC KL": Trace_ELBO(), "analytic KL": TraceMeanField_ELBO()}
        evidence = log_evidence(model, guide, x).mean()
        print(compare_elbos(model, guide, x, estimators, evidence=evidence))

    Estimators take turns, draw by draw, with the same seed in each turn: those with as many particles
    see the same noise, and a slow moment of the machine falls on all. For a comparison at equal
    particles give them the same ``num_particles``; ``snr_per_root_second`` compares them at equal time.

    Two questions are kept apart. How far below log p(x) is the *bound*? That is the gap. Does the *estimator*
    hit what it is meant to estimate? That is the bias, and it takes a target: a closed form, or an
    estimator of the same bound with less noise. IWAE with k particles is not a biased ELBO but an unbiased
    estimator of a bound of its own.

    Nothing is moved: not parameters, their ``grad``, buffers or the random state. The modules run in
    the mode they are in, train or eval. Memory holds two float64 numbers a parameter and estimator,
    whatever the number of draws.

    An snr near :attr:`Comparison.snr_floor` says "none seen": a mean over few draws is not 0 even where
    the expectation is. Parameters whose gradient has no noise (an analytic KL's in the prior) are left
    out of the snr's average; it is infinite where no parameter of the group has any.

    Args:
        model: makes Pyro statements, as for :class:`~pyro_vae.SVI`.
        guide: likewise.
        batch: the data, a tensor ``(N, ...)`` or a tuple of the model's arguments.
        estimators: name -> a Pyro ELBO.
        num_draws: of every estimator, at least 2.
        evidence: log p(x) in nats a datum, for the gap: a closed form, or the mean of
            :func:`~pyro_vae.log_evidence`. Nothing checks that the loss is a bound on it: with a KL weight
            it is not.
        targets: an estimator's name -> the loss that it is meant to have, as a differentiable function of
            ``(model, guide, *batch)``, in nats and summed over the data, such as
            ``Trace_ELBO(num_particles=1000).differentiable_loss``. It is drawn as often, with other noise.
        groups: name -> a module or parameters. If not given: those of the model, those of the guide,
            and those that they share.
        seed: of the noise.

    Returns:
        A :class:`Comparison`.

    Raises:
        ValueError: if an argument is not as above; naming the estimator, if :class:`~pyro_vae.SVI` refuses it
            for this pair, or a loss or gradient is not finite.

    References:
        Rainforth et al. 2018, Tighter Variational Bounds are Not Necessarily Better, arXiv 1802.04537 (the
        signal-to-noise ratio); Welford 1962 (the running variance).
    """
    args = as_args(batch)
    _check_arguments(estimators, num_draws, targets, seed)
    targets = targets or {}
    known = None if evidence is None else _finite("evidence", evidence)
    trained = parameters(model, guide)
    svis: dict[str, SVI] = {}
    for name, elbo in estimators.items():
        with _named(name):
            svis[name] = SVI(model, guide, _Still(trained, {}), loss=elbo)
    members = _members(model, guide, trained, groups)
    seeds = torch.randint(2**62, (2, num_draws), generator=torch.Generator().manual_seed(int(seed))).tolist()
    draws = {name: _Draws() for name in svis}
    aims = {target: _Draws() for target in targets.values()}

    with _left_alone(model, guide, trained) as before:

        def draw(name: str, seed: int) -> tuple[float, float]:
            before.restore(random_state=False)
            torch.manual_seed(seed)
            start = time.perf_counter()
            with _named(name):
                loss = svis[name].step(*args)  # reads the loss and the gradients: a device is done with them
            return loss, time.perf_counter() - start

        for name in svis:
            draw(name, 0)  # what is done once, as compiling, is no part of a step's cost
        names = list(svis)
        for turn, number in enumerate(seeds[0]):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                loss, seconds = draw(name, number)
                draws[name].add(loss, _flat(trained, [p.grad for p in trained]), seconds)
        for target, drawn in aims.items():
            for number in seeds[1]:
                before.restore(random_state=False)
                torch.manual_seed(number)
                with Pair(model, guide).isolated(validate=False):
                    aimed = _differentiable(target(model, guide, *args))
                    gradients = torch.autograd.grad(aimed, trained, allow_unused=True)
                drawn.add(aimed.item(), _flat(trained, gradients), 0.0)
        num_data = svis[names[0]].num_data(*args)

    rounding = torch.cat([torch.full((p.numel(),), 8 * torch.finfo(p.dtype).eps) for p in trained]).double()
    records = []
    for name, drawn in draws.items():
        aim = aims[targets[name]] if name in targets else None
        about = {"estimator": name, "particles": int(estimators[name].num_particles)}
        about |= _about_value(drawn, aim, num_data, known)
        for group, where in members.items():
            records.append(
                {**about, "group": group, **_about_gradient(drawn, aim, num_data, where, rounding)}
            )
    return Comparison(records, int(num_draws), num_data, known)


class _Moments:
    """Mean and variance of numbers or vectors that come one by one, in float64 (Welford 1962)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros((), dtype=torch.float64)
        self.squares = torch.zeros((), dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        self.count += 1
        delta = x - self.mean
        self.mean = self.mean + delta / self.count
        self.squares = self.squares + delta * (x - self.mean)

    @property
    def variance(self) -> Tensor:
        return self.squares / (self.count - 1)


class _Draws:
    """What was drawn of an estimator or of a target."""

    def __init__(self) -> None:
        self.loss, self.gradient = _Moments(), _Moments()
        self.seconds: list[float] = []

    def add(self, loss: float, gradient: Tensor, seconds: float) -> None:
        self.loss.add(torch.tensor(loss, dtype=torch.float64))
        self.gradient.add(gradient)
        self.seconds.append(seconds)


def _about_value(drawn: _Draws, aim: _Draws | None, num_data: int, evidence: float | None) -> dict[str, Any]:
    value = -drawn.loss.mean.item() / num_data
    sd = drawn.loss.variance.sqrt().item() / num_data
    error = sd / math.sqrt(drawn.loss.count)
    bias = bias_error = None
    if aim:
        bias = value + aim.loss.mean.item() / num_data
        bias_error = math.hypot(error, (aim.loss.variance / aim.loss.count).sqrt().item() / num_data)
    return {
        "value": value,
        "value_error": error,
        "value_sd": sd,
        "gap": None if evidence is None else evidence - value,
        "gap_error": None if evidence is None else error,
        "bias": bias,
        "bias_error": bias_error,
        "ms": 1000 * statistics.median(drawn.seconds),
    }


def _about_gradient(
    drawn: _Draws, aim: _Draws | None, num_data: int, where: Tensor, rounding: Tensor
) -> dict[str, Any]:
    mean, variance = drawn.gradient.mean[where], drawn.gradient.variance[where]
    snr = _snr(mean, variance.sqrt(), rounding[where])
    bias = bias_error = None
    norm, whole = (aim.gradient.mean[of].norm().item() for of in (where, ...)) if aim else (0.0, 0.0)
    if aim and norm > 10 * rounding.max().item() * whole:  # else there is nothing to be relative to
        bias = (mean - aim.gradient.mean[where]).norm().item() / norm
        noise = variance / drawn.gradient.count + aim.gradient.variance[where] / aim.gradient.count
        bias_error = noise.sum().sqrt().item() / norm
    return {
        "gradient_variance": variance.sum().item() / num_data**2,
        "snr": snr,
        "snr_per_root_second": None if snr is None else snr / math.sqrt(statistics.median(drawn.seconds)),
        "gradient_bias": bias,
        "gradient_bias_error": bias_error,
    }


class _Still(torch.optim.Optimizer):
    """An optimiser that steps nowhere, so that a step only computes its gradients."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Leave the parameters where they are."""


def _snr(mean: Tensor, sd: Tensor, rounding: Tensor) -> float | None:
    noisy = sd > rounding * mean.abs()
    if noisy.any():
        return (mean[noisy].abs() / sd[noisy]).mean().item()
    return math.inf if mean.any() else None


def _flat(trained: list[nn.Parameter], gradients: Iterable[Tensor | None]) -> Tensor:
    """Gradients as one vector, zeros where a parameter has none."""
    return torch.cat(
        [
            torch.zeros(p.numel(), dtype=torch.float64)
            if g is None
            else g.detach().to_dense().flatten().to("cpu", torch.float64)
            for p, g in zip(trained, gradients, strict=True)
        ]
    )


def _differentiable(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.dim() or not loss.requires_grad or not loss.isfinite():
        raise ValueError(
            "A target is a function of (model, guide, *batch) whose result is the loss: a finite "
            f"differentiable tensor of shape (), in nats, summed over the data. Got {loss!r}."
        )
    return loss


def _members(
    model: Program,
    guide: Program,
    trained: list[nn.Parameter],
    groups: Mapping[str, nn.Module | Iterable[nn.Parameter]] | None,
) -> dict[str, Tensor]:
    """Return each group's places in the flat gradient."""
    if groups is None:
        ours, theirs = ({id(p) for p in parameters(program, program)} for program in (model, guide))
        split = {"model": ours - theirs, "guide": theirs - ours, "shared": ours & theirs}
        ids = {name: group for name, group in split.items() if group}
    else:
        if not isinstance(groups, Mapping) or not groups:
            raise ValueError(f"groups expects a dict, name -> module or parameters, got {groups!r}.")
        ids = {}
        for name, group in groups.items():
            listed = group.parameters() if isinstance(group, nn.Module) else group
            named = [p for p in listed if p.requires_grad] if isinstance(listed, Iterable) else []
            ids[name] = set(map(id, named))
            if not ids[name] or ids[name] - set(map(id, trained)):
                raise ValueError(
                    f"groups['{name}'] expects some of the trainable parameters of model and guide, "
                    f"got {'others too' if ids[name] else 'none'}. Take them from "
                    "pyro_vae.parameters(model, guide)."
                )
    sizes = [(id(p), p.numel()) for p in trained]
    return {
        name: torch.cat([torch.full((size,), p in group) for p, size in sizes]).nonzero().squeeze(1)
        for name, group in ids.items()
    }


@contextmanager
def _left_alone(model: Program, guide: Program, trained: list[nn.Parameter]) -> Iterator[Snapshot]:
    """Put gradients, buffers and the random state back at the end."""
    before = Pair(model, guide).snapshot()
    gradients = [p.grad for p in trained]
    try:
        yield before
    finally:
        before.restore()
        for p, gradient in zip(trained, gradients, strict=True):
            p.grad = gradient


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Say which estimator an error is of."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"Estimator '{name}': {error}") from error


def _check_arguments(
    estimators: Mapping[str, ELBO], num_draws: int, targets: Mapping[str, Loss] | None, seed: int
) -> None:
    if not isinstance(estimators, Mapping) or not estimators:
        raise ValueError(
            "estimators expects a dict of names and Pyro ELBOs, such as {'Trace': Trace_ELBO()}, got "
            f"{estimators!r}."
        )
    if not isinstance(num_draws, Integral) or num_draws < 2:
        raise ValueError(
            f"num_draws is a whole number of at least 2, without which there is no variance, got {num_draws}."
        )
    if not isinstance(seed, Integral) or not 0 <= seed < 2**63:
        raise ValueError(f"seed is a whole number from 0 to 2^63 - 1, got {seed}.")
    for name, target in (targets or {}).items():
        if name not in estimators:
            raise ValueError(
                f"targets expects names of the estimators, {list(estimators)}, got '{name}'. Use one of them."
            )
        if isinstance(target, ELBO) or not callable(target):
            raise ValueError(
                f"targets['{name}'] expects a function of (model, guide, *batch), got "
                f"{type(target).__name__}. Of an ELBO pass its method differentiable_loss."
            )


def _finite(name: str, number: Any) -> float:
    if isinstance(number, Tensor) and not number.dim():
        number = number.item()
    if not isinstance(number, Real) or not math.isfinite(number):
        raise ValueError(f"{name} expects a finite number in nats a datum, got {number!r}.")
    return float(number)
