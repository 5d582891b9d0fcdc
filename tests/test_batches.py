"""Batches that a program cannot take: the error names the mistake, and nothing changes."""

import copy
import dataclasses
import gc
import math
import threading
import weakref

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.nn import PyroModule
from registry import data, pair
from torch import nn

import pyro_vae as pv
import pyro_vae.svi

TOOLS = {
    "step": lambda svi, *batch: svi.step(*batch),
    "evaluate_loss": lambda svi, *batch: svi.evaluate_loss(*batch),
    "fit": lambda svi, *batch: list(pv.fit(svi, [batch if len(batch) > 1 else batch[0]], 1)),
    "elbo_terms": lambda svi, *batch: pv.elbo_terms(svi.model, svi.guide, batch),
    "log_evidence": lambda svi, *batch: pv.log_evidence(svi.model, svi.guide, batch, 5),
    "latent_terms": lambda svi, *batch: pv.latent_terms(svi.model, svi.guide, batch, 5),
    "reconstruct": lambda svi, *batch: pv.reconstruct(svi.model, svi.guide, batch),
    "explain": lambda svi, *batch: pv.explain(svi.model, svi.guide, Trace_ELBO(), *batch),
}
LABELS = torch.arange(8) % 2
MISTAKES = {
    "labels": (
        (data(), LABELS),
        "expected 1 parts, as the guide takes .x., got 2. To fix: drop.*for x, _ in",
    ),
    "a NumPy array": ((data().numpy(),), r"got numpy\.ndarray\. To fix: torch\.from_numpy\(x\)\.float\(\)"),
}


@pytest.mark.parametrize("tool", TOOLS.values(), ids=TOOLS)
@pytest.mark.parametrize(("batch", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_common_mistake_names_itself(batch, message, tool):
    programs = pair()
    svi = pv.SVI(*programs, pyro.optim.Adam({"lr": 1e-2}), loss=Trace_ELBO())
    before = copy.deepcopy([program.state_dict() for program in programs])
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=f"The batch: .*{message}"):
        tool(svi, *batch)
    torch.testing.assert_close([p.state_dict() for p in programs], before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("parts", [[data(), LABELS], (data(),)], ids=["list", "tuple"])
def test_a_list_in_place_of_its_parts_names_itself(parts):
    svi = pv.SVI(*pair(), pyro.optim.Adam({"lr": 1e-2}), loss=Trace_ELBO())
    message = f"got one {type(parts).__name__} of {len(parts)}. To fix: svi.step"
    for method in (svi.step, svi.evaluate_loss):
        with pytest.raises(ValueError, match=message):
            method(parts)


class Listed(PyroModule):
    """A program that takes a list, an array and any number of arguments."""

    def __init__(self, program):
        super().__init__()
        self.program = program

    def forward(self, parts, *more):
        return self.program(torch.cat([torch.as_tensor(part) for part in parts]))


def test_a_program_may_take_lists_arrays_and_any_number_of_arguments():
    programs = map(Listed, pair())
    svi = pv.SVI(*programs, pyro.optim.Adam({"lr": 1e-2}), loss=Trace_ELBO())
    assert svi.step([data(), data().numpy()], LABELS, np.ones(3)) > 0
    svi = pv.SVI(Listed(pair()[0]), Listed(pair(width=7)[1]), pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    with pytest.raises(ValueError, match=r"MLP\(7, 5, 4\): expected"):  # and not: too many parts
        svi.step([data()], LABELS)


@pytest.mark.parametrize("where", ["encoder", "decoder"])
def test_a_batch_of_one_under_batch_norm_names_itself(where):
    model, guide = pair()
    if where == "encoder":
        guide = pv.Guide(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4), pv.DiagNormal()))
    else:
        model.decoder = nn.Sequential(nn.Linear(2, 5), nn.BatchNorm1d(5), nn.Linear(5, 6), pv.Bernoulli())
    svi = pv.SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), loss=Trace_ELBO())
    svi.step(data())
    side = "guide" if where == "encoder" else "model"
    with pytest.raises(ValueError, match=f"two or more data points, since the {side} has.*drop_last=True"):
        svi.step(data()[:1])
    assert pv.elbo_terms(model, guide, data()[:1]).elbo.isfinite().all()  # in eval mode


def observed(fn):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", fn(z.exp()), obs=x)

    return model


def draws(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))


VOCABULARY = {
    "counts": (
        lambda rate: dist.Poisson(rate).to_event(1),
        torch.tensor([[0.5, 3.0]]),
        "give counts as they are, whole numbers of 0 or more; .*under a Gaussian",
    ),
    "tokens": (
        lambda rate: dist.Categorical(logits=rate[..., None, :].expand(-1, 4, -1)).to_event(1),
        torch.tensor([[0, 1, 0, -100]]),
        r"whole numbers from 0 to 1; leave padding .such as -100. out by a mask",
    ),
    "positive columns": (
        lambda rate: dist.Gamma(rate, rate).to_event(1),
        torch.tensor([[-1.0, 200.0]]),
        "bring the data into the support, or observe them under another distribution",
    ),
    "bytes": (
        lambda rate: dist.ContinuousBernoulli(logits=rate).to_event(1),
        torch.tensor([[0.0, 200.0]]),
        "divide by 255, since these look like 8-bit",
    ),
}


@pytest.mark.parametrize(("fn", "x", "message"), VOCABULARY.values(), ids=VOCABULARY)
def test_values_outside_the_support_are_named_in_the_terms_of_their_kind(fn, x, message):
    with pytest.raises(ValueError, match=message) as caught:
        pv.elbo_terms(observed(fn), draws, x)
    assert ("pixel" in str(caught.value) or "255" in str(caught.value)) == ("255" in message)


@pytest.mark.parametrize("loader", ["Batches", "DataLoader"])
def test_fit_refuses_a_last_batch_of_one_before_it_trains(loader):
    model, _ = pair()
    guide = pv.Guide(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4), pv.DiagNormal()))
    pixels = torch.randint(2, (9, 6), dtype=torch.uint8)

    def batches(**options):
        if loader == "Batches":
            return pv.data.Batches(255 * pixels, pv.data.ThresholdBinarisation(), 4, **options)
        return torch.utils.data.DataLoader(pixels.float(), 4, **options)

    svi = pv.SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), loss=Trace_ELBO())
    before = copy.deepcopy([model.state_dict(), guide.state_dict()])
    with pytest.raises(ValueError, match="two or more data points.*drop_last=True"):
        list(pv.fit(svi, batches(), 1))
    torch.testing.assert_close([model.state_dict(), guide.state_dict()], before, rtol=0, atol=0)
    assert len(list(pv.fit(svi, batches(drop_last=True), 2))) == 2


def without_a_family():
    model, guide = pair()
    yield "model", pv.Model(pv.StandardNormal(2), pv.MLP(2, 5, 6)), guide
    yield "guide", model, pv.Guide(pv.MLP(6, 5, 4))


@pytest.mark.parametrize("elbo", [Trace_ELBO(), pv.IWAE(3), None], ids=["Trace_ELBO", "IWAE", "evaluation"])
def test_a_network_without_a_family_names_itself(elbo):
    for side, model, guide in without_a_family():
        svi = pv.SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), loss=elbo or Trace_ELBO())
        tool = TOOLS["step" if elbo else "elbo_terms"]
        with pytest.raises(ValueError, match=f"The {side}: .*does a network end without a fam"):
            tool(svi, data())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_pair_in_reduced_precision_is_pointed_to_autocast(dtype):
    programs = [program.to(dtype) for program in pair()]
    svi = pv.SVI(*programs, pyro.optim.Adam({"lr": 1e-2}), loss=Trace_ELBO())
    with pytest.raises(ValueError, match=f"got {dtype}. To fix: keep model and guide in float32.*autocast"):
        svi.step(data())


def test_no_dump_of_shapes_stands_behind_a_message():
    guide = pv.Guide(nn.Sequential(pv.MLP(6, 5, 3), pv.DiagNormal()))
    for wrong in (guide, pv.Guide(nn.Sequential(pv.MLP(7, 5, 4), pv.DiagNormal()))):
        svi = pv.SVI(pair()[0], wrong, pyro.optim.Adam({"lr": 1e-2}), loss=Trace_ELBO())
        with pytest.raises(ValueError, match="To fix: ") as caught:
            svi.step(data())
        assert "Trace Shapes" not in str(caught.value)
        assert "\n" not in str(caught.value)


def test_data_and_protocols_of_another_kind_name_themselves():
    pixels = torch.zeros(4, 3, dtype=torch.uint8)
    for call in (lambda *given: pv.data.Batches(*given, 2), pv.data.observe):
        with pytest.raises(ValueError, match="protocol: expected a protocol, got the class Grey. To fix"):
            call(pixels, pv.data.Grey)
        with pytest.raises(ValueError, match="images: expected Images or a uint8.*got ndarray.*from_numpy"):
            call(pixels.numpy(), pv.data.Grey())


# A network that is not as wide as the family behind it reads.


def decoder(width, family):
    return pv.Model(pv.StandardNormal(2), nn.Sequential(pv.MLP(2, 5, width), family)), pair()[1]


def encoder(width, family):
    return pair()[0], pv.Guide(nn.Sequential(pv.MLP(6, 5, width), family))


WIDTHS = {
    "PixelSigma": (decoder(6, pv.Gaussian(pv.PixelSigma())), "'x' of the model", "6", "Gaussian in 12"),
    "Categorical": (decoder(6, pv.Categorical(3)), "'x' of the model", "6", "Categorical in 18"),
    "Bernoulli": (decoder(12, pv.Bernoulli()), "'x' of the model", "6", "Bernoulli in 6"),
    "DiagNormal": (encoder(2, pv.DiagNormal()), "'z' of the guide", "2", "DiagNormal in 4"),
    "FullNormal": (encoder(2, pv.FullNormal()), "'z' of the guide", "2", "FullNormal in 5"),
}


@pytest.mark.parametrize("tool", ["step", "log_evidence"])
@pytest.mark.parametrize(("programs", "site", "size", "fix"), WIDTHS.values(), ids=WIDTHS)
def test_a_network_of_another_width_is_told_the_right_one(programs, site, size, fix, tool):
    svi = pv.SVI(*programs, pyro.optim.Adam({"lr": 1e-2}), loss=Trace_ELBO())
    with pytest.raises(
        ValueError, match=f"{site}: expected an event of {size} .*network before {fix} features"
    ):
        TOOLS[tool](svi, data())


def test_the_right_width_is_that_of_the_one_family_alone():
    model, guide = decoder(7, pv.Bernoulli())
    model.decoder = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), pv.DiagNormal(), pv.Bernoulli())
    model.decoder.forward = lambda z: dist.Normal(torch.zeros(len(z), 7), 1.0).to_event(1)
    svi = pv.SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), loss=Trace_ELBO())
    with pytest.raises(
        ValueError, match=r"expected shape \(8, 7\), batch then event.*a decoder that is as wide"
    ):
        svi.step(data())  # which of the two families it is, nobody can know


# Distributions whose last dimension is not marked as an event.


class Statements(PyroModule):
    """z of two dimensions and x of six, in a plate, with the given distributions."""

    def __init__(self, z, x=None):
        super().__init__()
        self.network = nn.Linear(6, 2)
        self.z, self.x = z, x

    def forward(self, x):
        with pyro.plate("data", len(x)):
            loc = self.network(x) if self.x is None else torch.zeros(len(x), 2)
            z = pyro.sample("z", self.z(loc))
            if self.x is not None:
                pyro.sample("x", self.x(z @ torch.ones(2, 6)), obs=x)


def event(loc):
    return dist.Normal(loc, 1.0).to_event(1)


def no_event(loc):
    return dist.Normal(loc, 1.0)


@pytest.mark.parametrize("rows", [8, 2, 6], ids=["other sizes", "as many as z", "as many as x"])
@pytest.mark.parametrize("tool", ["step", "elbo_terms", "explain"])
@pytest.mark.parametrize(
    ("model", "guide", "message"),
    [
        (Statements(no_event, event), Statements(event), "Site 'z' of the model"),
        (Statements(event, event), Statements(no_event), "Site 'z' of the guide"),
        (Statements(event, no_event), Statements(event), "Site 'x' of the model"),
        (Statements(no_event, no_event), Statements(no_event), "Site '[xz]' of the "),
    ],
    ids=["prior", "guide", "likelihood", "all"],
)
def test_a_missing_to_event_is_named(model, guide, message, tool, rows):
    svi = pv.SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), loss=Trace_ELBO())
    with pytest.raises(
        ValueError, match=rf"{message}.*: expected batch dimensions for its plates.*\.to_event\(1\)"
    ):
        TOOLS[tool](svi, torch.ones(rows, 6))


@pytest.mark.parametrize("side", [0, 1], ids=["model", "guide"])
@pytest.mark.parametrize("tool", [*sorted(TOOLS), "generate"])
def test_nan_weights_on_a_first_batch_are_named(side, tool):
    programs = pair()
    name, weight = next(programs[side].named_parameters())
    weight.data[0, 0] = torch.nan
    svi = pv.SVI(*programs, pyro.optim.Adam({"lr": 1e-2}), loss=Trace_ELBO())
    if tool == "generate" and side:
        assert pv.generate(programs[0], data())["x"].mean.isfinite().all()  # needs no guide
        return
    call = (lambda svi, x: pv.generate(svi.model, x)) if tool == "generate" else TOOLS[tool]
    with pytest.raises(ValueError, match=f"expected finite parameters, got NaN or infinity in '{name}'"):
        call(svi, data())


@pytest.mark.parametrize("batch", [data()[:0], (data()[:0], LABELS[:0])], ids=["x", "x, y"])
def test_an_empty_batch_generates_nothing(batch):
    with pytest.raises(ValueError, match="expected at least one data point, got an empty tensor"):
        pv.generate(pair()[0], batch)


# What has no hash among the arguments.


class Ignoring(PyroModule):
    """A program that ignores its second argument."""

    def __init__(self, program):
        super().__init__()
        self.program = program

    def forward(self, x, extra):
        return self.program(x)


@pytest.mark.parametrize("extra", [{1}, [{1}], {"a": bytearray(3)}], ids=["set", "in a list", "in a dict"])
def test_arguments_without_a_hash_are_checked_once(extra, monkeypatch):
    checked = []
    check = pyro_vae.svi.check_pair
    monkeypatch.setattr(pyro_vae.svi, "check_pair", lambda *given: checked.append(1) or check(*given))
    svi = pv.SVI(*map(Ignoring, pair()), pyro.optim.Adam({"lr": 1e-2}), loss=Trace_ELBO())
    assert len(list(pv.fit(svi, [(data(), extra)] * 3, 2, progress=False))) == 2
    assert len(checked) == 1


@dataclasses.dataclass(frozen=True)
class Frozen:
    """Python calls it hashable; it is not."""

    parts: list


def test_a_frozen_class_around_a_list_has_no_hash_either():
    svi = pv.SVI(*map(Ignoring, pair()), pyro.optim.Adam({"lr": 1e-2}), loss=Trace_ELBO())
    assert svi.step(data(), Frozen([1])) > 0


def test_a_new_object_at_each_step_leaves_nothing_behind(monkeypatch):
    monkeypatch.setattr(pyro_vae.programs.cache, "_MOST", 3)
    svi = pv.SVI(*map(Ignoring, pair()), pyro.optim.Adam({"lr": 1e-2}), loss=Trace_ELBO())
    seen = []
    for _ in range(6):
        extra = threading.Event()
        seen.append(weakref.ref(extra))
        svi.step(data(), extra)
    del extra
    gc.collect()
    assert [reference() is None for reference in seen] == [True] * 3 + [False] * 3


# A posterior whose scale collapses.


@pytest.mark.parametrize(
    "elbo", [Trace_ELBO(), TraceMeanField_ELBO(), pv.IWAE(3)], ids=lambda e: type(e).__name__
)
def test_a_collapsed_scale_names_the_encoders_input_and_bounds_help(elbo):
    counts = torch.full((8, 6), 3000.0)

    def svi(family):
        model, _ = pair("gaussian-learned")
        guide = pv.Guide(nn.Sequential(pv.MLP(6, 5, 4), family))
        nn.init.constant_(guide.encoder[0][0].weight, 0.5)
        nn.init.constant_(guide.encoder[0][-1].weight, -0.5)  # log sigma falls with the size of x
        return pv.SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), loss=elbo)

    fix = r"To fix: scale the encoder's input .log1p for counts., bound the scale .DiagNormal\(bounds="
    after_steps = fix.replace("To fix: ", "To fix: lower the learning rate, ")
    with pytest.raises(ValueError, match=f"the scale of its Normal.*{fix}"):
        svi(pv.DiagNormal()).step(counts)
    later = svi(pv.DiagNormal())
    later.step(torch.zeros(8, 6))
    with pytest.raises(
        ValueError,
        match=f"site 'z' of the guide, Normal.*Its scale is between 0 and 0. .*{after_steps}",
    ):
        later.step(counts)
    bounded = svi(pv.DiagNormal(bounds=(-6, 2)))
    assert bounded.step(counts) > 0
    scale = bounded.guide.encoder(counts).base_dist.scale
    torch.testing.assert_close(scale, torch.full_like(scale, math.exp(-6)))


@pytest.mark.parametrize("bounds", [3, "ab", (1,), (2, 1), (None, 1), (0, math.inf)])
def test_bounds_that_are_none_are_refused(bounds):
    for family in (pv.DiagNormal, pv.PixelSigma, lambda bounds: pv.DiscretizedLogistic(bounds=bounds)):
        with pytest.raises(ValueError, match="bounds: expected two finite numbers, low < high"):
            family(bounds=bounds)
