"""Native code: C++ kernels as functions of Python, this package's own and those of torch's compiler."""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch

# A kernel as a function of Python: a tensor goes to it as the pointer to its numbers.
Kernel = Callable[..., None]


@cache
def begin(name: str) -> Callable[[], Kernel]:
    """Begin to compile the function ``kernel`` of a C++ file of this package; return what waits for it.

    It is compiled once on a machine. It includes nothing of torch's, whose headers take seconds to read.

    Raises:
        ValueError: if it cannot be compiled here. What waits for it raises that as well.
    """

    @contextmanager
    def naming_it() -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of many kinds
            raise failure(error, name) from error

    with naming_it():
        # A root that sets errno cannot be one of many at once.
        wait = _begin(_text(name), ["kernel"], ["-fno-math-errno"])

    def kernel() -> Kernel:
        with naming_it():
            return wait()[0]

    return kernel


@contextmanager
def in_one_file() -> Iterator[None]:
    """Let torch's compiler write the C++ kernels of a graph into one file.

    It writes a file for each. All begin with a header of torch's that takes seconds to read, fifty times as
    long as a kernel. Torch reads it ahead, once on a machine, but in twice that time, and even then a file
    takes a second.
    """
    from torch._inductor import async_compile  # slow to import

    with mock.patch.object(async_compile, "AsyncCompile", _in_one_file()):
        yield


class _Source(str):
    """A kernel in C++."""


@cache
def _in_one_file() -> type:
    from torch._inductor.async_compile import AsyncCompile

    class InOneFile(AsyncCompile):
        """What the compiler's Python code hands kernels to, and waits for them with."""

        def cpp_pybinding(self, argtypes: list[str], source_code: str) -> Any:
            return _Source(source_code)

        def wait(self, scope: dict[str, Any]) -> None:
            sources = {name: held for name, held in scope.items() if isinstance(held, _Source)}
            if sources:
                kernels = _begin(_joined(sources), [f"{name}::kernel" for name in sources], ["-w"])
                scope.update(zip(sources, kernels(), strict=True))
            super().wait(scope)

    return InOneFile


def _joined(sources: dict[str, _Source]) -> str:
    """Return one source of many, with the includes first, and each in a namespace of its name."""
    includes: list[str] = []
    kernels: list[str] = []
    for name, source in sources.items():
        kernels += ["namespace", name, "{"]
        for line in source.replace('extern "C"', "", 1).splitlines():  # of a name there is but one in C
            (includes if line.lstrip().startswith("#include") else kernels).append(line)
        kernels += ["}"]
    return "\n".join([*dict.fromkeys(includes), *kernels])


def _begin(source: str, kernels: Sequence[str], flags: Sequence[str] = ()) -> Callable[[], Sequence[Kernel]]:
    """Begin to compile a C++ source; return what waits for its kernels."""
    from torch._inductor import config

    bindings = _text("bindings.cpp").replace("KERNELS", ", ".join(kernels))
    compiler = ThreadPoolExecutor(1)
    with config.patch(vectors()):
        library = _library().load_async(f"{source}\n{bindings}", submit_fn=compiler.submit, extra_flags=flags)
    compiler.shutdown(wait=False)

    def wait() -> Sequence[Kernel]:
        guards: Any = torch._C._dynamo.guards
        functions = library().functions
        functions.restype = ctypes.py_object
        made: Sequence[Kernel] = functions(ctypes.c_void_p(guards._torchinductor_pyobject_tensor_data_ptr))
        return made

    return wait


@cache
def _library() -> Any:
    from torch._inductor.codecache import CppCodeCache

    class Library(CppCodeCache):
        @staticmethod
        def _load_library_inner(path: str, key: str) -> ctypes.CDLL:
            return ctypes.PyDLL(path)  # it makes Python's objects

    return Library


def _text(name: str) -> str:
    return Path(__file__).with_name(name).read_text()


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
