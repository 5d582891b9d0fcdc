"""Native code: what the C++ compiler makes of this package's loops."""

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from torch._inductor.cpp_builder import CppOptions

import pyro_vae

GXX = shutil.which("g++")


@pytest.mark.skipif(
    GXX is None or (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="no GCC for x86-64"
)
@pytest.mark.filterwarnings("default")  # torch 2.11's compiler uses what torch deprecates
@pytest.mark.parametrize("level", ["x86-64-v3", "x86-64-v4"])  # with AVX2, and with AVX-512
@pytest.mark.parametrize("name", ["adam.cpp", "products.cpp"])
def test_each_loop_that_is_meant_to_be_one_of_vectors_is(name, level, tmp_path):
    """No number tells whether the compiler can, and a loop that it cannot takes four times as long."""
    source = Path(pyro_vae.__file__).with_name(name)
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
