"""Torch's fused optimisers under SVI: gradients, running means and parameters in any memory layout."""

import copy

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO
from registry import data, pair
from torch import nn

import pyro_vae as pv

FUSED = {
    "PyroOptim": lambda programs: pyro.optim.Adam({"lr": 0.1}),
    "Adam": lambda programs: torch.optim.Adam(pv.parameters(*programs), lr=0.1, fused=True),
    "AdamW": lambda programs: torch.optim.AdamW(
        pv.parameters(*programs), lr=0.1, weight_decay=0.0, fused=True
    ),
}


def plain_adam(programs):
    return torch.optim.Adam(pv.parameters(*programs), lr=0.1, foreach=False)


class Linear(nn.Module):
    """A guide with one matrix."""

    def __init__(self, loc):
        super().__init__()
        self.loc = nn.Parameter(loc)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", pyro.distributions.Normal(x @ self.loc, 1.0).to_event(1))


def train(make, change, steps=4):
    """Train a pair, changing something before each step; return its parameters."""
    torch.manual_seed(0)
    programs = pair()[0], Linear(torch.randn(6, 2))
    svi = pv.SVI(*programs, make(programs), loss=Trace_ELBO())
    for step in range(steps):
        torch.manual_seed(step)
        change(step, svi)
        svi.step(data())
    return pv.parameters(*programs)


def transposed(tensor):
    return tensor.t().contiguous().t()


def give_a_transposed_gradient(step, svi):
    if step == 0:
        p = svi.guide.loc
        gradient = torch.arange(float(p.numel())).reshape(p.shape[::-1]).t() - 5.0
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", gradient))


def transpose_a_parameter(step, svi):
    if step in (1, 3):
        p = svi.guide.loc
        p.data = transposed(p.data) if step == 1 else p.data.contiguous()


def load_transposed_means(step, svi):
    if step == 2:
        saved = copy.deepcopy(svi.optimizer.state_dict())
        for number, p in enumerate(q for group in svi.optimizer.param_groups for q in group["params"]):
            if p is svi.guide.loc:
                for key in ("exp_avg", "exp_avg_sq"):
                    saved["state"][number][key] = transposed(saved["state"][number][key])
        svi.optimizer.load_state_dict(saved)


@pytest.mark.parametrize("change", [give_a_transposed_gradient, transpose_a_parameter, load_transposed_means])
@pytest.mark.parametrize("make", FUSED.values(), ids=FUSED)
def test_no_layout_is_misread(make, change):
    """Torch's fused loop goes through the memory of all tensors side by side (2.15)."""
    torch.testing.assert_close(train(make, change), train(plain_adam, change), rtol=1e-5, atol=1e-6)


def test_a_pyro_optim_becomes_torch_s_fused_adam():
    svi = pv.SVI(*pair(), pyro.optim.Adam({"lr": 0.1}), loss=Trace_ELBO())
    assert type(svi.optimizer) is torch.optim.Adam
    assert svi.optimizer.param_groups[0]["fused"]


def test_a_parameter_with_gaps_in_memory_is_not_fused_or_refused():
    trained = []
    for make in (FUSED["PyroOptim"], plain_adam):
        torch.manual_seed(0)
        programs = pair()[0], Linear(torch.zeros(6, 4)[:, ::2])
        svi = pv.SVI(*programs, make(programs), loss=Trace_ELBO())
        for _ in range(3):
            svi.step(data())
        trained.append(pv.parameters(*programs))
    torch.testing.assert_close(*trained)
    svi = pv.SVI(*programs, FUSED["Adam"](programs), loss=Trace_ELBO())
    before = copy.deepcopy(programs[1].loc.data)
    with pytest.raises(ValueError, match=r"expected parameters that fill their memory, .*fused=False"):
        svi.step(data())
    assert torch.equal(programs[1].loc, before)


@pytest.mark.parametrize("make", FUSED.values(), ids=FUSED)
def test_running_means_of_another_shape_are_refused_and_nothing_changes(make):
    torch.manual_seed(0)
    programs = pair()[0], Linear(torch.zeros(6, 2))
    svi = pv.SVI(*programs, make(programs), loss=Trace_ELBO())
    svi.step(data())
    p = svi.guide.loc
    svi.optimizer.state[p]["exp_avg"] = torch.zeros(3)
    before = copy.deepcopy([program.state_dict() for program in programs])
    with pytest.raises(ValueError, match=r"expected exp_avg of the shape of its parameter, .*got \(3,\)"):
        svi.step(data())
    after = [program.state_dict() for program in programs]
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert p.grad is None
