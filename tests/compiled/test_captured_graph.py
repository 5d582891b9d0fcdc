"""The graph itself: which operations it keeps, in which precision it computes, which memory it uses."""

import platform
import subprocess
import sys

import pytest
import torch
from product_graphs import assume_onednn_faster, error_bound
from torch._ops import OpOverload
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_vae.compiled import CapturedGraph
from pyro_vae.compiled.internals import no_kept_sources
from pyro_vae.compiled.passes import simplify
from pyro_vae.programs import Pair, no_guide


def test_a_graph_keeps_what_its_results_depend_on_and_what_it_changes():
    def function(x, count, mean, variance):
        torch.rand(2)  # moves the random state
        count.add_(1)
        torch.nn.functional.batch_norm(x.expand(2, 3), mean, variance, training=True)
        torch._assert_async((x >= 0).all())
        (5 * x).sum()
        zeros, ones = (lambda: torch.zeros(3)), (lambda: torch.ones(3))
        written = zeros()
        written[0] = 7
        noise = [torch.normal(zeros(), ones()), torch.normal(ones(), ones()), torch.normal(written, ones())]
        wide = torch.normal(torch.zeros(1), ones())
        return (sum(noise) + wide + x.expand(3).view(3)).detach()

    def inputs():
        return torch.arange(3.0), torch.zeros(()), torch.zeros(3), torch.ones(3)

    captured = make_fx(function)(*inputs())
    once, again = inputs(), inputs()
    torch.manual_seed(0)
    expected = captured(*once)
    simplify(captured.graph)
    captured.recompile()
    torch.manual_seed(0)
    torch.testing.assert_close(captured(*again), expected, rtol=0, atol=0)
    torch.testing.assert_close(once, again, rtol=0, atol=0)
    kept = [
        node.target.overloadpacket for node in captured.graph.nodes if isinstance(node.target, OpOverload)
    ]
    aten = torch.ops.aten
    assert kept.count(aten.randn) == 1
    assert kept.count(aten.normal) == 3
    assert kept.count(aten._assert_async) == 1
    assert not {aten.sum, aten.view, aten.alias} & set(kept)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.filterwarnings("default")
def test_what_a_program_keeps_from_autocast_stays_float32(compiled):
    def kept(pair):
        with torch.autocast("cpu", enabled=False):
            return pair.args[0] @ pair.args[1]

    torch.manual_seed(0)
    a, b = torch.randn(40, 48), torch.randn(48, 64)
    with assume_onednn_faster(False), torch.autocast("cpu", torch.bfloat16):
        pair = Pair(no_guide, no_guide, (a, b))
        graph = CapturedGraph(kept, pair)
        product = (graph.compile() if compiled else graph)(pair)
    assert ((product.double() - a.double() @ b.double()).abs() <= error_bound(a, b, 2**-24)).all()


MEMORY = """
import resource, pyro, torch
from pyro.infer import Trace_ELBO
from torch import nn
import pyro_vae as pv
model = pv.Model(pv.StandardNormal(2), nn.Sequential(pv.MLP(2, 8, 784), pv.Bernoulli()))
guide = pv.Guide(nn.Sequential(pv.MLP(784, 8, 4), pv.DiagNormal()))
loss = pv.CompiledELBO(Trace_ELBO(), backend="eager")
svi = pv.SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), loss=loss)
x = torch.ones(1024, 784)
for steps in (3, 5):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(steps):
        svi.step(x)
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // steps)
"""


@pytest.mark.proofs
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about the memory allocator of glibc")
def test_a_step_does_not_fault_in_its_memory_again():
    # In a process of its own, as the allocator goes by all that its process has freed.
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    pages = 1024 * 784 * 4 // 4096  # of one tensor of the size of a batch
    assert int(run.stdout) < pages


def test_a_torch_that_keeps_no_sources_is_served(monkeypatch):
    monkeypatch.setattr(torch.fx.graph_module, "_loader", object())
    with no_kept_sources():
        pass


def test_a_capture_leaves_no_source_code_behind():
    kept = torch.fx.graph_module._loader.eval_cache
    before = set(kept)
    CapturedGraph(lambda pair: pair.args[0] * 2, Pair(no_guide, no_guide, (torch.ones(2),)))
    assert set(kept) == before


def test_the_results_of_a_cuda_graph_outlive_its_next_run(monkeypatch):
    """It writes into the same memory at every run; this compiler on the CPU does so too."""

    def compile_in_place(graph, inputs, on_cuda):
        assert on_cuda
        memory = None

        def run(*inputs):
            nonlocal memory
            results = graph(*inputs)
            memory = memory or [torch.empty_like(each) for each in results]
            return [place.copy_(each) for place, each in zip(memory, results, strict=True)]

        return run

    def function(pair):
        (x,) = pair.args
        return [x.exp(), x.sum(), x.isfinite()]

    monkeypatch.setattr("pyro_vae.compiled.graph.compile_graph", compile_in_place)
    captured = CapturedGraph(function, Pair(no_guide, no_guide, (torch.ones(3),))).compile()
    captured._on_cuda = True
    batches = [torch.full((3,), float(number)) for number in range(3)]
    kept = [captured(Pair(no_guide, no_guide, (x,))) for x in batches]
    for x, results in zip(batches, kept, strict=True):
        torch.testing.assert_close(results, [x.exp(), x.sum(), x.isfinite()])
