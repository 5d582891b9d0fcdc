"""Passes: changes to a captured graph before it runs."""

from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from pyro_vae.compiled.products import linear_by_onednn


def has_shape_by_value(node: Node) -> bool:
    """Return whether the shape of a node's result depends on values."""
    if torch.Tag.dynamic_output_shape not in getattr(node.target, "tags", ()):
        return False
    if node.target is not torch.ops.aten.index.Tensor:
        return True
    indices = [index for index in cast(Any, node.args[1]) if isinstance(index, Node)]
    return any(index.meta["val"].dtype in (torch.bool, torch.uint8) for index in indices)


def simplify(graph: torch.fx.Graph) -> None:
    """Drop operations that change nothing or whose result is not used; draw standard normal noise in one."""
    aten = torch.ops.aten
    for node in graph.nodes:
        if node.target in (aten.alias.default, aten.detach.default, aten.expand.default, aten.view.default):
            before, after = node.args[0].meta["val"], node.meta["val"]
            dense = isinstance(before, Tensor) and isinstance(after, Tensor)
            if dense and (before.shape, before.stride()) == (after.shape, after.stride()):
                node.replace_all_uses_with(node.args[0])
        elif node.target is aten.t.default and node.args[0].target is aten.t.default:
            node.replace_all_uses_with(node.args[0].args[0])
        elif node.target is aten.normal.Tensor_Tensor and not node.kwargs:
            mean, sigma = node.args
            standard = (mean.target, sigma.target) == (aten.zeros.default, aten.ones.default)
            alike = (mean.args, mean.kwargs) == (sigma.args, sigma.kwargs)
            if standard and alike and [*mean.users] == [*sigma.users] == [node]:
                with graph.inserting_before(node):  # the same numbers, from the same random stream
                    noise = graph.call_function(aten.randn.default, mean.args, mean.kwargs)
                noise.meta["val"] = node.meta["val"]
                node.replace_all_uses_with(noise)
                graph.erase_node(node)
    # For example, a log probability is unused if the ELBO takes an analytic KL instead. An operation with an
    # effect stays, even if its signature does not say so, such as BatchNorm's update of its statistics.
    effects = "batch_norm", "assert"
    graph.eliminate_dead_code(
        lambda node: node.is_impure() or any(effect in str(node.target) for effect in effects)
    )


def call_torch_functions(captured: GraphModule) -> GraphModule:
    """Call common operations through torch's functions of the same names, which takes half as much Python."""
    aten = torch.ops.aten
    others = aten.mm.default, aten.addmm.default, aten.t.default, aten.sum.default, aten.sum.dim_IntList
    for node in captured.graph.nodes:
        target = node.target  # a function may take less: torch.index_put takes no None in a list
        if target is torch.ops.pyro_vae.linear.default:
            node.target = linear_by_onednn
        elif getattr(target, "namespace", "") == "aten":
            common = torch.Tag.pointwise in target.tags or target in others
            node.target = getattr(torch, target.overloadpacket.__name__, target) if common else target
    captured.recompile()
    return captured
