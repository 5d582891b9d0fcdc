"""Compile C++ kernels, those of this package and those of torch's compiler, as functions of Python."""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch

# A C++ function that Python can call. It receives a tensor as the pointer to its numbers.
CppKernel = Callable[..., None]


@cache
def start_compiling(file_name: str) -> Callable[[], CppKernel]:
    """Start to compile the function ``kernel`` of a C++ file of this package.

    A second thread compiles it, once on a machine: torch keeps the result on disk. The file includes no
    header of torch, since those take seconds to read.

    Args:
        file_name: a file beside this one, such as ``"adam.cpp"``.

    Returns:
        A function that waits for the compiler and returns the kernel. It raises a ValueError if the file
        does not compile.

    Raises:
        ValueError: if the compiler cannot be started.
    """

    @contextmanager
    def naming_the_file() -> Iterator[None]:
        try:
            yield
        except Exception as error:  # errors of many types
            raise compiler_error(error, file_name) from error

    with naming_the_file():
        # A sqrt that sets errno cannot be vectorised.
        wait_for_kernels = _start_compiling_source(_read_source(file_name), ["kernel"], ["-fno-math-errno"])

    def wait_for_kernel() -> CppKernel:
        with naming_the_file():
            return wait_for_kernels()[0]

    return wait_for_kernel


@contextmanager
def kernels_in_one_file() -> Iterator[None]:
    """Make torch's compiler write all C++ kernels of a graph into one file.

    By default it writes one file for each kernel. Every file begins with a header of torch that takes
    seconds to read, fifty times as long as a kernel. Torch can precompile the header, once on a machine, but
    that takes twice as long, and each file still takes a second.
    """
    from torch._inductor import async_compile  # slow to import

    with mock.patch.object(async_compile, "AsyncCompile", _one_file_compiler()):
        yield


class _KernelSource(str):
    """The C++ source of one kernel that torch's compiler wrote."""


@cache
def _one_file_compiler() -> type:
    from torch._inductor.async_compile import AsyncCompile

    class OneFileCompiler(AsyncCompile):
        """Collect the kernels of a graph, and compile them together when the graph waits for them."""

        def cpp_pybinding(self, argtypes: list[str], source_code: str) -> Any:
            return _KernelSource(source_code)

        def wait(self, scope: dict[str, Any]) -> None:
            sources = {name: value for name, value in scope.items() if isinstance(value, _KernelSource)}
            if sources:
                kernel_names = [f"{name}::kernel" for name in sources]
                wait_for_kernels = _start_compiling_source(_join_sources(sources), kernel_names, ["-w"])
                scope.update(zip(sources, wait_for_kernels(), strict=True))
            super().wait(scope)

    return OneFileCompiler


def _join_sources(sources: dict[str, _KernelSource]) -> str:
    """Join the sources of several kernels: first the includes, then each kernel in a namespace of its own."""
    includes: list[str] = []
    kernels: list[str] = []
    for name, source in sources.items():
        kernels += ["namespace", name, "{"]
        # Two functions with C linkage cannot have one name, not even in two namespaces.
        for line in source.replace('extern "C"', "", 1).splitlines():
            (includes if line.lstrip().startswith("#include") else kernels).append(line)
        kernels += ["}"]
    return "\n".join([*dict.fromkeys(includes), *kernels])


def _start_compiling_source(
    source: str, kernel_names: Sequence[str], flags: Sequence[str] = ()
) -> Callable[[], Sequence[CppKernel]]:
    """Start to compile a C++ source; return a function that waits for its kernels."""
    from torch._inductor import config

    bindings = _read_source("bindings.cpp").replace("KERNELS", ", ".join(kernel_names))
    compiler = ThreadPoolExecutor(1)
    with config.patch(vector_options()):
        wait_for_library = _library_cache().load_async(
            f"{source}\n{bindings}", submit_fn=compiler.submit, extra_flags=flags
        )
    compiler.shutdown(wait=False)

    def wait_for_kernels() -> Sequence[CppKernel]:
        guards: Any = torch._C._dynamo.guards
        make_functions = wait_for_library().functions
        make_functions.restype = ctypes.py_object
        kernels: Sequence[CppKernel] = make_functions(
            ctypes.c_void_p(guards._torchinductor_pyobject_tensor_data_ptr)
        )
        return kernels

    return wait_for_kernels


@cache
def _library_cache() -> Any:
    from torch._inductor.codecache import CppCodeCache

    class LibraryCache(CppCodeCache):
        @staticmethod
        def _load_library_inner(path: str, key: str) -> ctypes.CDLL:
            return ctypes.PyDLL(path)  # keeps the GIL: the library makes Python objects

    return LibraryCache


def _read_source(file_name: str) -> str:
    return Path(__file__).with_name(file_name).read_text()


def register_extern_kernel(
    function: Callable[..., None], name: str
) -> Callable[[Sequence[Any], Sequence[Any]], Any]:
    """Let torch's compiler call ``function(*tensors, out=...)`` directly, with ``out`` in memory it plans.

    Args:
        function: writes float32 numbers into ``out``. All tensors and ``out`` are contiguous.
        name: the name of the function in the compiler's code; each function needs its own.

    Returns:
        A function for use in a lowering. It takes the tensors and the shape of ``out``, and adds the call to
        the program that is being compiled.
    """
    from torch._inductor import ir
    from torch._inductor.select_algorithm import ExternKernelChoice

    kernel = ExternKernelChoice(function, name=name)

    def add_call(tensors: Sequence[Any], shape: Sequence[Any]) -> Any:
        dense = [ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(each)) for each in tensors]
        layout = ir.FixedLayout(dense[0].get_device_or_error(), torch.float32, shape)
        return kernel.bind(dense, layout).output_node()

    return add_call


def vector_options() -> dict[str, Any]:
    """Return the compiler option that says that this processor's vector instructions work, where known."""
    # Without the option torch's compiler builds test programs to find out, which takes seconds.
    known = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    return {"cpp.vec_isa_ok": True} if known else {}


def compiler_error(error: Exception, what: str) -> ValueError:
    """Return the error to raise where torch's compiler fails."""
    return ValueError(
        f"torch's compiler: expected to compile {what}, got an error: {first_sentence(error)}. On a CPU it "
        "needs a C++ compiler. To fix: install one such as g++, or use CompiledELBO(elbo, backend='eager'), "
        "which compiles nothing."
    )


def first_sentence(error: BaseException) -> str:
    """Return the first sentence of an error's message."""
    return str(error).partition("\n")[0].partition(". ")[0]
