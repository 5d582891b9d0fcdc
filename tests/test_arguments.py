"""Batches that a program cannot take: the error names the mistake, and nothing changes."""

import copy

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.nn import PyroModule
from registry import data, pair
from torch import nn

import pyro_vae as pv

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
        "it has 2 parts, and the guide takes 1 .x.. To fix: drop.*for x, _ in",
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
    with pytest.raises(ValueError, match=r"expected shape \(3, 6\)"):  # and not: too many parts
        svi.step([torch.ones(3, 7)], LABELS)


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
        with pytest.raises(ValueError, match=f"The {side}: .*got a tensor: does a network end without a fam"):
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
        with pytest.raises(ValueError, match="protocol: expected a protocol, got <class.*Grey'>. To fix"):
            call(pixels, pv.data.Grey)
        with pytest.raises(ValueError, match="images: expected Images or a uint8.*got ndarray.*from_numpy"):
            call(pixels.numpy(), pv.data.Grey())
