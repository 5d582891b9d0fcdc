"""Two thousand calls of public functions with odd arguments: each is right, or refused in our own words.

The calls are drawn with a fixed seed: a call that works, with one or two arguments replaced by odd values. It
passes if it returns finite numbers, or if it raises a ValueError or TypeError of this package, with modules,
random state and the settings of torch and Pyro as before.
"""

import copy
import io
import random
import re
import tempfile
import warnings
from contextlib import redirect_stderr
from decimal import Decimal
from fractions import Fraction
from itertools import islice
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from registry import data, pair
from torch import Tensor, nn

import pyro_vae as pv

NUM_CALLS, PARTS = 2000, 20


def unseen(make, *args, **kwargs):
    """Make something from random numbers, and leave the random state alone."""
    with torch.random.fork_rng(devices=[]):
        return make(*args, **kwargs)


X = unseen(data)


def holes():
    """Data of which some are missing."""
    return data().index_fill(1, torch.tensor([0, 3]), torch.nan)


def svi(model=None, guide=None, optim=None, loss=None):
    made = unseen(pair)
    model, guide = made[0] if model is None else model, made[1] if guide is None else guide
    optim = pyro.optim.Adam({"lr": 1e-3}) if optim is None else optim
    return pv.SVI(model, guide, optim, Trace_ELBO() if loss is None else loss)


def fit(batches, epochs, **options):
    return list(islice(pv.fit(svi(), batches, epochs, **options), 2))


def step(**batch):
    return svi().step(*batch.values())


def written(path, data):
    """Write a file; a path is below a new folder."""
    with tempfile.TemporaryDirectory() as folder:
        path = type(path)(f"{folder}/{path}") if isinstance(path, str | Path) else path
        pv.write_file(path, data)


class Ignoring(nn.Module):
    """A program that ignores its second argument."""

    def __init__(self, program):
        super().__init__()
        self.program = program

    def forward(self, x, extra):
        return self.program(x)


def step_of_two(x, extra):
    return svi(*map(Ignoring, unseen(pair))).step(x, extra)


def unvalidated(family, features):
    """Make a distribution without the validation of torch, as in a step, and leave its numbers alone."""
    with pyro.validation_enabled(False):
        family(features)


def weighed_step(beta):
    with pv.scale_latents(beta):
        return svi().step(X)


def ran(objective):
    return svi(loss=objective).step(X)


def bytes_of_images():
    return torch.randint(256, (12, 6), dtype=torch.uint8)


BYTES = unseen(bytes_of_images)


def record():
    return {
        "estimator": "IWAE",
        "particles": 2,
        "value": -3.0,
        "value_error": 0.1,
        "gap": None,
        "ms": 1.0,
        "group": "all",
        "snr": 2.0,
        "snr_per_root_second": 3.0,
    }


def pictures():
    return torch.rand(6, 12)


LINEAR = pv.references.linear_gaussian(6, 2)
EPOCHS = [pv.Epoch(1, 3.0, -3.0, -2.0, 1.0, 0.1), pv.Epoch(2, 2.0, -2.0, -1.5, 0.5, 0.1)]

# name: (function, argument name -> () -> a value with which it works). Arguments are passed by their names.
CALLS = {
    "SVI": (svi, {"model": lambda: pair()[0], "guide": lambda: pair()[1], "optim": lambda: None}),
    "SVI, loss": (svi, {"loss": Trace_ELBO}),
    "step": (step, {"x": data}),
    "step of two": (step_of_two, {"x": data, "extra": lambda: torch.zeros(8)}),
    "evaluate_loss": (lambda x: svi().evaluate_loss(x), {"x": data}),
    "num_data": (lambda x: svi().num_data(x), {"x": data}),
    "fit": (fit, {"batches": lambda: [data()], "epochs": lambda: 1}),
    "fit with options": (
        fit,
        {
            "batches": lambda: [data()],
            "epochs": lambda: 1,
            "watch": data,
            "scheduler": lambda: None,
            "checkpoint": lambda: None,
            "progress": lambda: False,
        },
    ),
    "Checkpoint": (
        pv.Checkpoint,
        {
            "path": lambda: "/nowhere/a.pt",
            "resume": lambda: True,
            "every": lambda: 1,
            "settings": lambda: {"a": 1},
        },
    ),
    "write_file": (written, {"path": lambda: "a.txt", "data": lambda: "text"}),
    "elbo_terms": (pv.elbo_terms, {"model": lambda: pair()[0], "guide": lambda: pair()[1], "batch": data}),
    "log_evidence": (
        pv.log_evidence,
        {
            "model": lambda: pair()[0],
            "guide": lambda: pair()[1],
            "batch": data,
            "num_samples": lambda: 3,
            "compiled": lambda: False,
        },
    ),
    "mask_missing": (
        lambda model, guide, x: svi(*pv.mask_missing(model, guide)).step(x),
        {"model": lambda: pair()[0], "guide": lambda: pair()[1], "x": holes},
    ),
    "impute": (
        pv.impute,
        {"model": lambda: pair()[0], "guide": lambda: pair()[1], "batch": holes, "num_samples": lambda: 3},
    ),
    "conditional_evidence": (
        pv.conditional_evidence,
        {
            "model": lambda: pair()[0],
            "guide": lambda: pair()[1],
            "batch": holes,
            "given": lambda: X > 0,
            "num_samples": lambda: 3,
            "compiled": lambda: False,
        },
    ),
    "annealed_evidence": (
        pv.annealed_evidence,
        {
            "model": lambda: pair()[0],
            "guide": lambda: pair()[1],
            "batch": data,
            "num_chains": lambda: 3,
            "num_steps": lambda: 3,
            "latents": lambda: {"z": torch.zeros(8, 2)},
        },
    ),
    "evidence_diagnostics": (
        pv.evidence_diagnostics,
        {
            "model": lambda: pair()[0],
            "guide": lambda: pair()[1],
            "batch": data,
            "num_samples": lambda: 25,
        },
    ),
    "inference_gaps": (
        pv.inference_gaps,
        {
            "model": lambda: pair()[0],
            "guide": lambda: pair()[1],
            "batch": data,
            "num_steps": lambda: 2,
            "num_samples": lambda: 3,
        },
    ),
    "kl_decomposition": (
        pv.kl_decomposition,
        {"model": lambda: pair()[0], "guide": lambda: pair()[1], "batch": data, "num_samples": lambda: 2},
    ),
    "latent_terms": (
        pv.latent_terms,
        {"model": lambda: pair()[0], "guide": lambda: pair()[1], "batch": data, "num_samples": lambda: 3},
    ),
    "generate": (
        pv.generate,
        {"model": lambda: pair()[0], "batch": lambda: 3, "given": lambda: {"z": torch.zeros(3, 2)}},
    ),
    "reconstruct": (pv.reconstruct, {"model": lambda: pair()[0], "guide": lambda: pair()[1], "batch": data}),
    "explain": (
        lambda model, guide, elbo, x: pv.explain(model, guide, elbo, x),
        {"model": lambda: pair()[0], "guide": lambda: pair()[1], "elbo": TraceMeanField_ELBO, "x": data},
    ),
    "compare_elbos": (
        pv.compare_elbos,
        {
            "model": lambda: pair()[0],
            "guide": lambda: pair()[1],
            "batch": data,
            "estimators": lambda: {"IWAE": pv.IWAE(2)},
            "num_draws": lambda: 2,
            "evidence": lambda: 0.0,
            "targets": lambda: None,
            "groups": lambda: None,
            "seed": lambda: 0,
        },
    ),
    "scale_latents": (weighed_step, {"beta": lambda: 0.5}),
    "parameters": (pv.parameters, {"model": lambda: pair()[0], "guide": lambda: pair()[1]}),
    "IWAE": (
        lambda **o: ran(pv.IWAE(**o)),
        {"num_particles": lambda: 2, "vectorize_particles": lambda: True},
    ),
    "Renyi": (lambda **o: ran(pv.Renyi(**o)), {"alpha": lambda: 0.5, "num_particles": lambda: 2}),
    "STL": (lambda **o: ran(pv.STL(**o)), {"num_particles": lambda: 2, "vectorize_particles": lambda: True}),
    "DReG": (lambda **o: ran(pv.DReG(**o)), {"num_particles": lambda: 2}),
    "MeanField": (lambda **o: ran(pv.MeanField(**o)), {"num_particles": lambda: 2}),
    "FreeBits": (lambda **o: ran(pv.FreeBits(**o)), {"nats": lambda: 0.1, "num_particles": lambda: 1}),
    "CompiledELBO": (
        pv.CompiledELBO,
        {"elbo": Trace_ELBO, "backend": lambda: "eager", "check": lambda: False},
    ),
    "CompiledELBO, step": (
        lambda x: svi(loss=pv.CompiledELBO(Trace_ELBO(), backend="eager")).step(x),
        {"x": data},
    ),
    "Model": (
        lambda **o: svi(model=pv.Model(**o)).step(X),
        {"prior": lambda: pv.StandardNormal(2), "decoder": lambda: pair()[0].decoder},
    ),
    "Guide": (
        lambda encoder: svi(guide=pv.Guide(encoder)).step(X),
        {"encoder": lambda: pair()[1].encoder},
    ),
    "StandardNormal": (lambda dim: pv.StandardNormal(dim)(), {"dim": lambda: 2}),
    "MixturePrior": (
        lambda **o: unseen(pv.MixturePrior, **o)(),
        {"dim": lambda: 2, "components": lambda: 3},
    ),
    "VampPrior": (
        lambda **o: svi(model=pv.Model(pv.VampPrior(**o), unseen(pair)[0].decoder)).step(X),
        {"encoder": lambda: pair()[1].encoder, "pseudo_inputs": lambda: torch.rand(4, 6)},
    ),
    "FlowPrior": (
        lambda **o: unseen(pv.FlowPrior, **o)(),
        {"dim": lambda: 2, "steps": lambda: 1, "hidden": lambda: 3},
    ),
    "FlowNormal": (
        lambda features, **o: unvalidated(unseen(pv.FlowNormal, **o), features),
        {
            "dim": lambda: 2,
            "steps": lambda: 1,
            "hidden": lambda: 3,
            "context": lambda: 2,
            "features": lambda: torch.zeros(4, 6),
        },
    ),
    "MLP": (lambda a, b, x: unseen(pv.MLP, a, b)(x).shape, {"a": lambda: 6, "b": lambda: 3, "x": data}),
    "MLP, activation": (
        lambda activation: unseen(pv.MLP, 6, 3, 2, activation=activation)(X),
        {"activation": lambda: nn.Tanh},
    ),
    "ConvDown": (
        lambda x, shape, channels, **o: unseen(pv.ConvDown, shape, channels, **o)(x).shape,
        {
            "shape": lambda: (1, 2, 4),
            "channels": lambda: 3,
            "num_features": lambda: 4,
            "x": lambda: torch.rand(5, 8),
        },
    ),
    "ConvUp": (
        lambda z, num_features, channels, **o: unseen(pv.ConvUp, num_features, channels, **o)(z).shape,
        {
            "num_features": lambda: 4,
            "channels": lambda: 3,
            "shape": lambda: (1, 2, 4),
            "z": lambda: torch.rand(5, 4),
        },
    ),
    **{
        name: (lambda features, family=family: unvalidated(family, features), {"features": made})
        for name, (family, made) in {
            "Bernoulli": (pv.Bernoulli(), data),
            "ContinuousBernoulli": (pv.ContinuousBernoulli(), data),
            "Gaussian, learned": (pv.Gaussian(pv.LearnedSigma()), data),
            "Gaussian, pixel": (pv.Gaussian(pv.PixelSigma()), data),
            "Categorical": (pv.Categorical(3), data),
            "DiscretizedLogistic": (pv.DiscretizedLogistic(16), data),
            "DiagNormal": (pv.DiagNormal(), data),
            "FullNormal": (pv.FullNormal(), lambda: torch.zeros(4, 5)),
        }.items()
    },
    "Gaussian": (pv.Gaussian, {"sigma": lambda: 0.1}),
    "LearnedSigma": (pv.LearnedSigma, {"initial": lambda: 0.2, "bounds": lambda: (-6, 2)}),
    "PixelSigma": (pv.PixelSigma, {"bounds": lambda: (-6, 2)}),
    "DiagNormal, bounds": (pv.DiagNormal, {"bounds": lambda: (-6, 2)}),
    "levels": (pv.Categorical, {"levels": lambda: 4}),
    "levels and bounds": (pv.DiscretizedLogistic, {"levels": lambda: 4, "bounds": lambda: (-6, 2)}),
    "load": (
        lambda **o: pv.data.load(**o).pixels[:2],
        {"name": lambda: "mnist", "train": lambda: False, "root": lambda: None},
    ),
    "Images": (
        lambda **o: pv.data.observe(pv.data.Images(**o), pv.data.Grey()),
        {
            "pixels": bytes_of_images,
            "labels": lambda: torch.zeros(12, dtype=torch.long),
            "name": lambda: "mine",
            "shape": lambda: (2, 3),
            "classes": lambda: ("a",),
        },
    ),
    "Batches": (
        lambda **o: list(pv.data.Batches(**o)),
        {
            "images": bytes_of_images,
            "protocol": pv.data.Grey,
            "batch_size": lambda: 4,
            "shuffle": lambda: True,
            "drop_last": lambda: False,
            "device": lambda: None,
        },
    ),
    "observe": (
        pv.data.observe,
        {"images": bytes_of_images, "protocol": pv.data.DynamicBinarisation, "seed": lambda: 0},
    ),
    "GreyLevels": (
        lambda levels: pv.data.observe(BYTES, pv.data.GreyLevels(levels)),
        {"levels": lambda: 4},
    ),
    "StaticBinarisation": (
        lambda seed: pv.data.observe(BYTES, pv.data.StaticBinarisation(seed)),
        {"seed": lambda: 0},
    ),
    "plots.images": (
        pv.plots.images,
        {"x": pictures, "shape": lambda: (3, 4), "columns": lambda: 3, "title": lambda: "t"},
    ),
    "plots.reconstructions": (
        pv.plots.reconstructions,
        {"x": pictures, "x_hat": pictures, "shape": lambda: (3, 4), "columns": lambda: 3},
    ),
    "plots.learning_curves": (pv.plots.learning_curves, {"epochs": lambda: EPOCHS}),
    "plots.elbo_comparison": (pv.plots.elbo_comparison, {"records": lambda: [record()]}),
    "plots.latent_plane": (
        pv.plots.latent_plane,
        {
            "z": lambda: torch.randn(6, 2),
            "labels": lambda: torch.arange(6) % 2,
            "classes": lambda: ["a", "b"],
        },
    ),
    "plots.manifold": (pv.plots.manifold, {"x": lambda: torch.rand(4, 12), "shape": lambda: (3, 4)}),
    "plots.latent_grid": (pv.plots.latent_grid, {"side": lambda: 3}),
    "plots.latent_lines": (
        pv.plots.latent_lines,
        {
            "z": lambda: torch.randn(3),
            "dimensions": lambda: [0, 2],
            "steps": lambda: 3,
            "reach": lambda: 2.0,
        },
    ),
    "plots.latent_paths": (
        pv.plots.latent_paths,
        {"start": lambda: torch.randn(2, 3), "end": lambda: torch.randn(2, 3), "steps": lambda: 3},
    ),
    "references.linear_gaussian": (
        lambda **o: unseen(pv.references.linear_gaussian, **o),
        {"width": lambda: 3, "dim": lambda: 2, "sigma": lambda: 0.7},
    ),
    "references.Mixture": (
        lambda **o: unseen(pv.references.Mixture, **o),
        {"components": lambda: 3, "width": lambda: 2, "sigma": lambda: 0.7},
    ),
    "references.evidence": (lambda x: pv.references.evidence(LINEAR[0], x), {"x": lambda: data().double()}),
    "references.elbo": (lambda x: pv.references.elbo(*LINEAR, x), {"x": lambda: data().double()}),
    "references.set_to_posterior": (
        lambda spread: pv.references.set_to_posterior(*unseen(pv.references.linear_gaussian), spread),
        {"spread": lambda: 1.0},
    ),
}


class NoStatements(nn.Module):
    """A program that makes no Pyro statement."""

    def forward(self, *args):
        return args


def quantised():
    with warnings.catch_warnings(action="ignore"):
        return torch.quantize_per_tensor(torch.rand(8, 6), 0.1, 0, torch.quint8)


def sparse():
    return torch.eye(8, 6).to_sparse()


ODD = {
    "None": lambda: None,
    "True": lambda: True,
    "0": lambda: 0,
    "-1": lambda: -1,
    "2": lambda: 2,
    "1.5": lambda: 1.5,
    "NaN": lambda: float("nan"),
    "infinity": lambda: float("inf"),
    "a complex number": lambda: 1j,
    "a fraction": lambda: Fraction(1, 2),
    "a decimal": lambda: Decimal("0.5"),
    "NumPy's 3": lambda: np.int64(3),
    "NumPy's 0.5": lambda: np.float32(0.5),
    "NumPy's array": lambda: np.zeros((8, 6), np.float32),
    "NumPy's bytes": lambda: np.zeros((8, 6), np.uint8),
    "NumPy's objects": lambda: np.array([None, "x"], dtype=object),
    "no text": lambda: "",
    "text": lambda: "mnist $\\frac{",
    "bytes": lambda: b"abc",
    "a path": lambda: Path("/nowhere/at/all"),
    "[]": list,
    "()": tuple,
    "{}": dict,
    "a set": lambda: {1, 2},
    "a dict": lambda: {"x": data()},
    "a dict of numbers": lambda: {1: 2},
    "a list of numbers": lambda: [1, 2],
    "a list of text": lambda: ["a", "b"],
    "a tuple of numbers": lambda: (-1, 2.5),
    "a list of tensors": lambda: [data(), data()],
    "a list of None": lambda: [None, None],
    "a generator": lambda: (i for i in range(2)),
    "an object": object,
    "a class": lambda: object,
    "a function": lambda: lambda *args, **kwargs: None,
    "a function of a tensor": lambda: lambda *args, **kwargs: torch.ones(3),
    "a network": lambda: nn.Linear(6, 6),
    "a class of networks": lambda: nn.Linear,
    "an ELBO": Trace_ELBO,
    "a class of ELBOs": lambda: Trace_ELBO,
    "a distribution": lambda: dist.Normal(0.0, 1.0),
    "a program without statements": NoStatements,
    "a model": lambda: pair()[0],
    "a guide": lambda: pair()[1],
    "an SVI": svi,
    "a number in a tensor": lambda: torch.tensor(2),
    "a vector": lambda: torch.rand(6),
    "no rows": lambda: torch.zeros(0, 6),
    "no columns": lambda: torch.zeros(8, 0),
    "one row": lambda: torch.ones(1, 6),
    "another width": lambda: torch.ones(8, 7),
    "five dimensions": lambda: torch.rand(2, 1, 1, 2, 3),
    "NaN in a tensor": lambda: torch.full((8, 6), torch.nan),
    "infinity in a tensor": lambda: torch.full((8, 6), torch.inf),
    "huge values": lambda: torch.full((8, 6), 3e38),
    "int64": lambda: torch.ones(8, 6, dtype=torch.long),
    "int64 below 0": lambda: torch.full((8,), -5),
    "uint8": lambda: torch.ones(8, 6, dtype=torch.uint8),
    "bool": lambda: torch.ones(8, 6, dtype=torch.bool),
    "float16": lambda: torch.ones(8, 6, dtype=torch.float16),
    "bfloat16": lambda: torch.ones(8, 6, dtype=torch.bfloat16),
    "float64": lambda: torch.ones(8, 6, dtype=torch.float64),
    "complex64": lambda: torch.ones(8, 6, dtype=torch.complex64),
    "a sparse tensor": sparse,
    "a quantised tensor": quantised,
    "a meta tensor": lambda: torch.ones(8, 6, device="meta"),
    "a tensor with gradients": lambda: torch.ones(8, 6, requires_grad=True),
    "a parameter": lambda: nn.Parameter(torch.ones(8, 6)),
    "strides of 0": lambda: torch.ones(1, 6).expand(8, 6),
}


def drawn(part):
    """Return the calls of a part of the two thousand: (name, argument -> the name of an odd value)."""
    chance = random.Random(part)
    for _ in range(NUM_CALLS // PARTS):
        name = chance.choice(list(CALLS))
        arguments = CALLS[name][1]
        replaced = chance.sample(list(arguments), min(len(arguments), chance.choice([1, 1, 1, 2])))
        yield name, {argument: chance.choice(list(ODD)) for argument in replaced}


def settings():
    return (
        torch.get_rng_state().tolist(),
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.get_num_threads(),
        dist.is_validation_enabled(),
        dict(pyro.get_param_store()),
        list(pyro.poutine.runtime._PYRO_STACK),
    )


def states(values):
    """Return what may not change: parameters, buffers and modes of modules among values."""
    modules = [each for each in values if isinstance(each, nn.Module)]
    modes = [[inner.training for inner in each.modules()] for each in modules]
    return copy.deepcopy([each.state_dict() for each in modules]), modes


def is_finite(result):
    """Say whether the numbers of a result are finite, as far as they can be read."""
    if isinstance(result, Tensor):
        return bool(result.isfinite().all()) if result.is_floating_point() and not result.is_meta else True
    if isinstance(result, tuple | list):
        return all(map(is_finite, result))
    if isinstance(result, dict):
        return all(map(is_finite, result.values()))
    return result == result and abs(result) < float("inf") if isinstance(result, float) else True


def is_ours(error):
    # What a network multiplies is torch's business: its message names both dtypes or devices.
    if isinstance(error, RuntimeError):
        return bool(re.search("same dtype|same type|scalar type|expected device", str(error)))
    ours = isinstance(error, ValueError | TypeError)
    return ours and "expected" in str(error) and "To fix: " in str(error) and len(str(error)) < 1000


def complaint(name, odd):
    """Make a call; return what is wrong with how it ends, or ""."""
    function, arguments = CALLS[name]
    values = {argument: value() for argument, value in arguments.items()}
    values |= {argument: ODD[value]() for argument, value in odd.items()}
    before, torch_and_pyro = states(values.values()), settings()
    result, error = None, None
    try:
        with warnings.catch_warnings(action="ignore"), redirect_stderr(io.StringIO()):
            torch.manual_seed(0)
            random_state = torch.get_rng_state()
            result = function(**values)
    except Exception as raised:
        error = raised
    if error is not None and not is_ours(error):
        return f"{type(error).__name__}: {error}"
    if error is not None and not torch.equal(torch.get_rng_state(), random_state):
        return "the random state moved"
    if error is None and not is_finite(result):
        return f"not finite: {result}"
    if error is not None and str(states(values.values())) != str(before):
        return "a module changed"
    if settings()[1:] != torch_and_pyro[1:]:
        return "a setting changed"
    return ""


@pytest.mark.proofs
@pytest.mark.parametrize("part", range(PARTS))
def test_odd_calls_are_right_or_refused_in_our_words(part, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # some of them write
    complaints = {}
    for name, odd in drawn(part):
        torch.manual_seed(0)
        if found := complaint(name, odd):
            complaints[f"{name}: {odd}"] = found
    assert not complaints, "\n".join(f"{call} -> {found}" for call, found in complaints.items())


def test_the_calls_work_without_odd_values():
    for name in CALLS:
        torch.manual_seed(0)
        assert not complaint(name, {}), name
        function, arguments = CALLS[name]
        with warnings.catch_warnings(action="ignore"):
            function(**{argument: value() for argument, value in arguments.items()})  # and is not refused
