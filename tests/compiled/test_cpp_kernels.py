"""Native code: what the C++ compiler makes of this package's loops, and kernels as functions of Python."""

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pyro
import pytest
import torch
from pyro.infer import TraceMeanField_ELBO
from registry import data, pair
from torch._inductor import config
from torch._inductor.codecache import CppPythonBindingsCodeCache
from torch._inductor.cpp_builder import CppOptions

import pyro_vae as pv
from pyro_vae.compiled.cpu import cpp_kernels

GXX = shutil.which("g++")


@pytest.mark.skipif(
    GXX is None or (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="no GCC for x86-64"
)
@pytest.mark.filterwarnings("default")  # torch 2.11's compiler uses what torch deprecates
@pytest.mark.parametrize("level", ["x86-64-v3", "x86-64-v4"])  # with AVX2, and with AVX-512
@pytest.mark.parametrize("name", ["adam.cpp", "matrix_products.cpp"])
def test_each_loop_marked_simd_is_vectorised(name, level, tmp_path):
    """No number tells whether the compiler can, and a loop that it cannot takes four times as long."""
    source = Path(pv.__file__).parent / "compiled" / "cpu" / name
    flags = [f"-{flag}" for flag in CppOptions().get_cflags() if not flag.startswith("march")]
    command = [
        str(GXX),
        *flags,
        f"-march={level}",
        *("-fopenmp", "-fno-math-errno", "-fopt-info-vec-optimized"),
        *("-c", str(source), "-o", str(tmp_path / "out.o")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    vectorised = {int(line) for line in re.findall(r":(\d+):\d+: optimized: +loop vectorized", done.stderr)}
    lines = source.read_text().splitlines()
    meant = [i for i, line in enumerate(lines, 1) if line.startswith("#pragma omp simd")]
    assert meant
    for line in meant:
        assert vectorised & {*range(line, line + 4)}, f"{name}, line {line}: not vectorised"


SCALED_SUM = """#include <cstdint>
extern "C" void kernel(const float* x, float* out, int64_t size, float scale, bool negative) {
    *out = 0;
    for (int64_t i = 0; i < size; i++) *out += (negative ? -scale : scale) * x[i];
}"""


def compiles(test):
    test = pytest.mark.skipif(GXX is None, reason="no g++")(test)
    return pytest.mark.filterwarnings("default")(test)  # torch 2.11's compiler uses what torch deprecates


@compiles
def test_a_kernel_takes_tensors_and_numbers():
    (kernel,) = cpp_kernels._start_compiling_source(SCALED_SUM, ["kernel"])()
    x, out = torch.tensor([1.0, 2.0, 4.0]), torch.zeros(1)
    kernel(x, out, 3, 0.5, False)
    assert out.item() == 3.5
    kernel(x, out, 2, 0.5, True)
    assert out.item() == -1.5


WRONG = {
    "expected 5 arguments, got 4": (3, 0.5),
    "object cannot be interpreted as an integer": (3.5, 0.5, False),
    "must be real number": (3, "half", False),
}


@compiles
@pytest.mark.parametrize(("expected", "arguments"), WRONG.items(), ids=WRONG)
def test_a_kernel_does_not_run_with_wrong_arguments(expected, arguments):
    (kernel,) = cpp_kernels._start_compiling_source(SCALED_SUM, ["kernel"])()
    out = torch.full((1,), 7.0)
    with pytest.raises(TypeError, match=expected):
        kernel(torch.ones(3), out, *arguments)
    assert out.item() == 7


@compiles
def test_a_file_that_does_not_compile_is_named(monkeypatch):
    monkeypatch.setattr(cpp_kernels, "_read_source", lambda name: "this is no C++")
    wait = cpp_kernels.start_compiling.__wrapped__("adam.cpp")  # what is kept of an earlier call would do
    with pytest.raises(
        ValueError,
        match=r"torch's compiler: expected to compile adam\.cpp, got an error: .*To fix: install one",
    ):
        wait()


@compiles
@pytest.mark.parametrize("known", ["AVX2", "NO AVX"])
def test_torch_s_compiler_does_not_test_vector_instructions_that_are_known(known, monkeypatch):
    found = []

    def load_async(*args, **options):
        found.append(config.cpp.vec_isa_ok)

    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: known)
    monkeypatch.setattr(cpp_kernels._library_cache(), "load_async", load_async)
    with config.patch({"cpp.vec_isa_ok": None}):
        cpp_kernels._start_compiling_source(SCALED_SUM, ["kernel"])
    assert found == [True if known == "AVX2" else None]


@compiles
def test_torch_s_compiler_writes_one_file_for_a_graph(monkeypatch):
    """Each of its kernels in a file of its own would read the same long header again."""
    begun = []

    def begin(source, kernels, flags=()):
        begun.append((source, kernels))
        return as_it_is(source, kernels, flags)

    as_it_is = cpp_kernels._start_compiling_source
    monkeypatch.setattr(cpp_kernels, "_start_compiling_source", begin)
    monkeypatch.setattr(CppPythonBindingsCodeCache, "load_async", None)
    svi = pv.SVI(*pair(), pyro.optim.Adam({"lr": 1e-2}), loss=pv.CompiledELBO(TraceMeanField_ELBO()))
    with config.patch(force_disable_caches=True):
        svi.step(data())
    ((source, kernels),) = [each for each in begun if "cpp_prefix.h" in each[0]]
    assert len(kernels) > 2
    assert source.count("cpp_prefix.h") == 1
