"""The rules of scripts/lint_structure.py find what they are about, and nothing beside it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def lint() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lint", ROOT / "scripts/lint_structure.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def broken(lint: ModuleType, path: str, line: str) -> list[str]:
    code = line.split("//")[0]
    return [
        rule
        for pattern, applies, rule in lint.FORBIDDEN
        if applies(Path(path)) and pattern.search(code)
    ]


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("  v = _mm512_loadu_ps(x);", "SIMD"),
        ("__m256i v[4];", "SIMD"),
        ("__mmask16 m = _mm512_test_epi16_mask(a, b); __m512 z;", "SIMD"),
        ("_tile_dpbf16ps(0, 1, 2);", "SIMD"),
        ("x = vaddq_f32(a, b);", "SIMD"),
        ("x = svadd_f32_x(p, a, b);", "SIMD"),
        ("#include <immintrin.h>", "SIMD"),
        ("#include <arm_neon.h>", "SIMD"),
        ("x += __shfl_xor_sync(~0u, x, 1);", "warps"),
        ("x = __shfl_down(x, 1);", "warps"),
        ("if (__any_sync(~0u, x)) {", "warps"),
        ("__syncwarp();", "warps"),
        ("v = __ldg(p);", "warps"),
        ("x = __dp4a(a, b, c);", "warps"),
        ("#include <ATen/ATen.h>", "ATen and c10"),
        ("#include <c10/util/Half.h>", "ATen and c10"),
        ('#include "torch/csrc/stable/tensor.h"', "torch headers"),
        ('asm volatile("nop");', "asm"),
        ("#include <sstream>", "streams"),
        ("std::abort();", "never ends the process"),
    ],
)
def test_what_may_not_stand_in_a_kernel(lint: ModuleType, line: str, rule: str) -> None:
    assert any(rule in each for each in broken(lint, "native/kvcache/gather.cu", line)), line


@pytest.mark.parametrize(
    "line",
    [
        "gpu::shuffle_xor(x, 1); gpu::ballot(y);",
        "#include <ATen/dlpack.h>",
        "__syncthreads();",
        "const uint64_t v_1 = value_of_8(x);  // _mm512_loadu_ps",
        "__device__ __forceinline__ void f(const __nv_bfloat16* x);",
        "volatile int x;",
    ],
)
def test_what_may(lint: ModuleType, line: str) -> None:
    assert broken(lint, "native/kvcache/gather.cu", line) == []


def test_intrinsics_may_stand_in_prim(lint: ModuleType) -> None:
    for line in ("v = _mm512_loadu_ps(x);", "__syncwarp();", 'asm volatile("nop");'):
        assert broken(lint, "native/prim/gpu.h", line) == []
