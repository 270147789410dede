"""The CPU kernels under AddressSanitizer: random models and verbs of odd shapes stay inside their own memory.

The kernels are built again with -fsanitize=address, and run in a process that has its library loaded first.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tqdit.backends import native

pytestmark = pytest.mark.trust
HELPERS = Path(__file__).parents[1] / "backends"

EXERCISE = """
import torch
from tqdit.backends import native
from tqdit.runtime.convert import convert
from tqdit.speed.random_solution import random_solution
from tqdit.recipe import Recipe

assert native.reason() is None, native.reason()
torch.set_num_threads(2)
# heads, head_dim, channels, patch, side
SHAPES = [(1, 16, 1, 2, 6), (3, 24, 4, 2, 10), (2, 40, 3, 1, 9), (1, 72, 4, 2, 14)]
calls = 0
for heads, dim, channels, patch, side in SHAPES:
    config = dict(_class_name="DiTTransformer2DModel", num_layers=1, num_attention_heads=heads,
                  attention_head_dim=dim, in_channels=channels, out_channels=2 * channels,
                  sample_size=side, patch_size=patch, num_embeds_ada_norm=5, norm_eps=1e-6)
    for preset, bits in (("plus", "w8a8"), ("paper", "w6a6")):
        model = convert(random_solution(config, Recipe(preset, bits)), "cpu")
        for batch in (1, 2, 3):
            for height, width in ((side, side), (side + 2 * patch, side), (patch, patch)):
                x = torch.randn(batch, channels, height, width)
                t = torch.arange(batch) * 333 + 1
                with torch.no_grad():
                    out = model(x, t, torch.arange(batch), return_dict=False)[0]
                assert out.isfinite().all()
                calls += 1
print("calls:", calls)
"""

VERBS = """
import sys
import torch
from tqdit.backends import native
from tqdit.backends.cpu import NativeCpu
from tqdit.ops.schema import Activation, Norm, Residual
from tqdit.spec import Grid
sys.path.append(sys.argv[1])
from operands import maker

assert native.reason() is None, native.reason()
torch.set_num_threads(2)
run, calls = NativeCpu(), 0
# samples, queries, keys and values, heads, head_dim
for batch, tokens, length, heads, dim in ((1, 1, 1, 1, 1), (2, 5, 77, 3, 7), (3, 17, 1, 2, 13), (2, 40, 300, 1, 24)):
    for bits, merged in ((8, False), (6, True)):
        make, width = maker(bits, bits), heads * dim
        source, gelu = make.params(lead=batch), make.params(Grid.MRQ_GELU, batch, merged=merged)
        attention = make.attention(heads, Grid.MRQ_SOFTMAX, batch, merged)
        x, rows, bias = make.values(batch, tokens, width), make.values(batch, 2 * width), make.values(batch, length)
        layers = {n: run.prepare(make.weight(n * width, width), None) for n in (1, 2, 3)}
        codes = run.quantize(x, source, Norm(rows[:, :width], rows[:, width:], 1e-6))
        prompt = run.quantize(make.values(batch, length, width), source)
        q, k, v = attention.projections
        query = run.project(codes, source, layers[1], [q], heads)
        context = run.project(prompt, source, layers[2], [k, v], heads)
        for mask in (None, bias):
            codes = run.attend(query, attention, source, context, mask)
        own = run.attend(run.project(codes, source, layers[3], [q, k, v], heads), attention, source)
        for then in (None, Residual(x), Residual(x.bfloat16(), rows[:, :width]), Activation(source), Activation(gelu)):
            run.linear(own, source, layers[1], then)
        out = run.linear(run.quantize(x, gelu), gelu, layers[1], Residual(x))
        assert out.isfinite().all()
        calls += 1
print("calls:", calls)
"""


def sanitizer() -> str | None:
    """AddressSanitizer's library of GCC, where there is one."""
    compiler = shutil.which("g++")
    if compiler is None or not sys.platform.startswith("linux"):
        return None
    command = [compiler, "-print-file-name=libasan.so"]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return found if Path(found).is_file() else None


@pytest.mark.skipif(sanitizer() is None, reason="no g++ with AddressSanitizer here")
@pytest.mark.parametrize("more", ["", "-DTQDIT_FORCE_PANELS -mno-avx512vnni"])
@pytest.mark.parametrize(("code", "calls"), [(EXERCISE, 72), (VERBS, 8)], ids=["models", "verbs"])
def test_kernels_stay_inside_their_memory(tmp_path: Path, code: str, calls: int, more: str) -> None:
    """`more`: the integer products of the kernels in portable code as well."""
    environment = os.environ | {
        "TQDIT_CXX": str(shutil.which("g++")),
        "TQDIT_CXXFLAGS": f"-march=native -fsanitize=address -g -O1 {more}",
        "TQDIT_CACHE": str(tmp_path / "cache"),
        "LD_PRELOAD": str(sanitizer()),
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    done = subprocess.run(
        [sys.executable, "-c", code, str(HELPERS)], capture_output=True, text=True, check=False, env=environment,
        timeout=2 * native.BUILD_SECONDS,
    )  # fmt: skip
    assert "AddressSanitizer" not in done.stderr, done.stderr[-4000:]
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == f"calls: {calls}"


@pytest.mark.skipif(sanitizer() is None, reason="no g++ with AddressSanitizer here")
def test_the_sanitizer_would_say_so(tmp_path: Path) -> None:
    """A read beyond the end is reported where Python calls a library in the same way."""
    source = tmp_path / "wrong.cpp"
    source.write_text('extern "C" int beyond(int i) { int* x = new int[4]; int y = x[i]; delete[] x; return y; }\n')
    library = tmp_path / "wrong.so"
    command = [
        str(shutil.which("g++")),
        "-fsanitize=address",
        "-g",
        "-fPIC",
        "-shared",
        str(source),
        "-o",
        str(library),
    ]
    subprocess.run(command, check=True)
    code = f"import ctypes; ctypes.CDLL({str(library)!r}).beyond(4)"
    environment = os.environ | {"LD_PRELOAD": str(sanitizer()), "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert "heap-buffer-overflow" in done.stderr
