"""Native code: what torch's compiler is told, and the C++ files of this package made into functions by it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch


def load(name: str, types: Sequence[str]) -> Callable[..., None]:
    """Return the function ``kernel`` of a C++ file of this package, compiled once on a machine.

    The file includes nothing of torch's, whose headers take seconds to compile.

    Args:
        name: the file's.
        types: of the arguments in C++; a tensor goes as the pointer to its numbers.

    Raises:
        ValueError: if it cannot be compiled here.
    """
    from torch._inductor import codecache, config  # slow to import

    source = Path(__file__).with_name(name).read_text()
    try:
        with config.patch({"cpp_cache_precompile_headers": False, **vectors()}):
            load_pybinding: Any = codecache.CppPythonBindingsCodeCache.load_pybinding
            # A root that sets errno cannot be one of many at once.
            kernel: Callable[..., None] = load_pybinding(list(types), source, extra_flags=["-fno-math-errno"])
    except Exception as error:  # of many kinds
        raise failure(error, name) from error
    return kernel


def call_into(function: Callable[..., None], name: str) -> Callable[[Sequence[Any], Sequence[Any]], Any]:
    """Let torch's compiler call ``function(*tensors, out=...)`` itself, and into memory that it plans.

    Args:
        function: writes float32 into out. The tensors and out lie row by row.
        name: what it is called in the compiler's code; another for each function.

    Returns:
        What makes such a call, where an operation is lowered, of the tensors and the shape of out.
    """
    from torch._inductor import ir
    from torch._inductor.select_algorithm import ExternKernelChoice

    kernel = ExternKernelChoice(function, name=name)

    def call(tensors: Sequence[Any], shape: Sequence[Any]) -> Any:
        dense = [ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(each)) for each in tensors]
        layout = ir.FixedLayout(dense[0].get_device_or_error(), torch.float32, shape)
        return kernel.bind(dense, layout).output_node()

    return call


def vectors() -> dict[str, Any]:
    """Return the option that says which vectors there are, where that is known."""
    # Torch's compiler finds out by building programs, for seconds.
    known = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    return {"cpp.vec_isa_ok": True} if known else {}


def failure(error: Exception, what: str) -> ValueError:
    """Return what to raise where torch's compiler fails."""
    return ValueError(
        f"torch's compiler fails on {what}: {first_line(error)}. On a CPU it needs a C++ compiler such as "
        "g++: install one, or do without compiling (CompiledELBO(elbo, backend='eager') replays the graph)."
    )


def first_line(error: BaseException) -> str:
    """Return the first sentence of an error."""
    return str(error).partition("\n")[0].partition(". ")[0]
