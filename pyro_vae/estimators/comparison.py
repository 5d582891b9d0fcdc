"""compare_elbos: compare estimators of a bound by their values, the noise of their gradients, and their cost.

Each draw of an estimator is one step of :class:`~pyro_vae.SVI` with an optimiser that changes nothing. So a
draw is checked like a training step and costs the same. All draws use one batch: the noise is that of the
estimator, without that of choosing the data.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from pyro.infer import ELBO
from torch import Tensor, nn

from pyro_vae.arguments import as_seed, given, is_finite, require, whole_number
from pyro_vae.estimators.comparison_table import Comparison
from pyro_vae.estimators.draw_statistics import gradient_statistics, value_statistics
from pyro_vae.estimators.draws import (
    Draws,
    Loss,
    NoUpdate,
    draw_estimators,
    draw_target,
    errors_with_name,
    restore_afterwards,
)
from pyro_vae.programs import Batch, Pair, Program, as_args, parameters
from pyro_vae.svi import SVI


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
    """Draw the loss and gradient of each estimator many times on one batch, and compare them.

    ::

        estimators = {"MC KL": Trace_ELBO(), "analytic KL": TraceMeanField_ELBO()}
        evidence = log_evidence(model, guide, x).mean()
        print(compare_elbos(model, guide, x, estimators, evidence=evidence))

    The estimators take turns. In each turn all of them get the same seed. So estimators with the same number
    of particles see the same noise. A slow moment of the machine affects all of them. To compare at equal
    particles, give all estimators the same ``num_particles``. To compare at equal time, use
    ``snr_per_root_second``.

    The comparison separates two questions. How far is the *bound* below log p(x)? That is the gap. Is the
    *estimator* right on average for its own bound? That is the bias. It needs a target: a closed form, or
    an estimator of the same bound with less noise. IWAE with k particles is not a biased ELBO. It is an
    unbiased estimator of another bound.

    The function changes nothing: parameters, their ``grad``, buffers and the random state stay as they were.
    The modules run in their current mode, train or eval. Memory use is two float64 numbers per parameter
    and estimator, for any number of draws.

    An snr near :attr:`Comparison.snr_floor` means that no signal was seen: a mean over few draws is not 0
    even where the expectation is. The average of the snr leaves out parameters whose gradient has no noise
    (such as those of the prior under an analytic KL). The snr is infinite if no parameter of the group
    has noise.

    Args:
        model: a Pyro model, as for :class:`~pyro_vae.SVI`.
        guide: a Pyro guide, as for :class:`~pyro_vae.SVI`.
        batch: the data, a tensor ``(N, ...)`` or a tuple of the model's arguments.
        estimators: name -> a Pyro ELBO.
        num_draws: the number of draws of each estimator, at least 2.
        evidence: log p(x) in nats per data point, for the gap: a closed form, or the mean of
            :func:`~pyro_vae.log_evidence`. It is not checked that the estimators bound it: with a KL
            weight or a factor they do not.
        targets: name of an estimator -> the loss that it should have on average, as a differentiable
            function of ``(model, guide, *batch)``, in nats and summed over the data, such as
            ``Trace_ELBO(num_particles=1000).differentiable_loss``. It is also drawn ``num_draws`` times, with
            other noise; a closed form only twice.
        groups: name -> a module or parameters. By default: the parameters of the model, those of the
            guide, and those that both share.
        seed: the seed of the noise.

    Returns:
        A :class:`Comparison`.

    Raises:
        ValueError: if an argument is not as described above. Also, with the estimator's name, if
            :class:`~pyro_vae.SVI` refuses the estimator for this pair, or if a loss or gradient is not
            finite.

    References:
        Rainforth et al. 2018, Tighter Variational Bounds are Not Necessarily Better, arXiv 1802.04537 (the
        signal-to-noise ratio); Welford 1962 (the running variance).
    """
    pair = Pair(model, guide, as_args(batch))
    _check_arguments(estimators, targets)
    num_draws = whole_number("num_draws", num_draws, 2, "100, say; one draw has no variance")
    seed = as_seed("seed", seed)
    targets = targets or {}
    log_px = None if evidence is None else _finite_number("evidence", evidence)
    svis: dict[str, SVI] = {}
    for name, elbo in estimators.items():
        with errors_with_name(name):
            svis[name] = SVI(model, guide, NoUpdate(pair.trainable, {}), loss=elbo)
    group_indices = _group_indices(pair, groups)
    generator = torch.Generator().manual_seed(seed)
    estimator_seeds, target_seeds = torch.randint(2**62, (2, num_draws), generator=generator).tolist()

    with restore_afterwards(pair) as before:
        draws = draw_estimators(svis, pair, estimator_seeds, before)
        target_draws: dict[Loss, Draws] = {}  # several estimators may share a target
        for name, target in targets.items():
            if target not in target_draws:
                target_draws[target] = draw_target(name, target, pair, target_seeds, before)
        num_data = next(iter(svis.values())).num_data(*pair.args)

    # The relative size below which a standard deviation is only rounding.
    rounding = torch.cat(
        [torch.full((p.numel(),), 8 * torch.finfo(p.dtype).eps) for p in pair.trainable]
    ).double()
    records = []
    for name, drawn in draws.items():
        of_target = target_draws[targets[name]] if name in targets else None
        estimator = {"estimator": name, "particles": int(estimators[name].num_particles)}
        value = value_statistics(drawn, of_target, num_data, log_px)
        for group, indices in group_indices.items():
            gradient = gradient_statistics(drawn, of_target, num_data, indices, rounding)
            records.append({**estimator, **value, "group": group, **gradient})
    return Comparison(records, num_draws, num_data, log_px)


def _group_indices(
    pair: Pair,
    groups: Mapping[str, nn.Module | Iterable[nn.Parameter]] | None,
) -> dict[str, Tensor]:
    """Return the indices of each group in the flat gradient."""
    if groups is None:
        in_model, in_guide = (
            {id(p) for p in parameters(program, program)} for program in (pair.model, pair.guide)
        )
        split = {"model": in_model - in_guide, "guide": in_guide - in_model, "shared": in_model & in_guide}
        ids = {name: group for name, group in split.items() if group}
    else:
        if not isinstance(groups, Mapping) or not len(groups):
            raise ValueError(
                f"groups: expected a dict, name -> module or parameters, got {given(groups)}. To fix: pass "
                "one such as {'decoder: model.decoder}, or leave groups out."
            )
        ids = {}
        for name, group in groups.items():
            listed = group.parameters() if isinstance(group, nn.Module) else group
            members = [p for p in listed if p.requires_grad] if isinstance(listed, Iterable) else []
            ids[name] = set(map(id, members))
            if not ids[name] or ids[name] - set(map(id, pair.trainable)):
                raise ValueError(
                    f"groups['{name}']: expected trainable parameters of model and guide, got "
                    f"{'other parameters too' if ids[name] else 'none'}. To fix: take them from "
                    "pyro_vae.parameters(model, guide)."
                )
    sizes = [(id(p), p.numel()) for p in pair.trainable]
    return {
        name: torch.cat([torch.full((size,), p in group) for p, size in sizes]).nonzero().squeeze(1)
        for name, group in ids.items()
    }


def _check_arguments(estimators: Mapping[str, ELBO], targets: Mapping[str, Loss] | None) -> None:
    filled = isinstance(estimators, Mapping) and bool(estimators)
    to_fix = "pass one such as {'Trace': Trace_ELBO()}"
    require(filled, "estimators", "a dict, name -> Pyro ELBO", given(estimators), to_fix)
    to_fix = "leave targets out, or pass functions of (model, guide, *batch)"
    none = targets is None or isinstance(targets, Mapping)
    require(none, "targets", "a dict, name of an estimator -> function", given(targets), to_fix)
    for name, target in (targets or {}).items():
        if name not in estimators:
            raise ValueError(
                f"targets: expected names of the estimators, {list(estimators)}, got '{name}'. To fix: use "
                "one of these names."
            )
        if isinstance(target, ELBO) or not callable(target):
            raise ValueError(
                f"targets['{name}']: expected a function of (model, guide, *batch), got "
                f"{type(target).__name__}. To fix: pass a function; for an ELBO, pass its method "
                "differentiable_loss."
            )


def _finite_number(name: str, number: Any) -> float:
    if isinstance(number, Tensor) and not number.dim() and not number.is_meta:
        number = number.item()
    to_fix = "pass one number, such as the mean over the data"
    require(is_finite(number), name, "a finite number in nats per data point", given(number), to_fix)
    return float(number)
