"""The kernels of the quantized all-reduce, compiled for the CPU and run as threads (emulated_gpu/).

Results are compared with the model bit for bit, and after each call the buffers must be at rest.
It shows errors of the protocol, not of the GPU's memory model; tests/gpu runs the same on a GPU.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from communicators.backends.quick import codecs as quick_codecs
from communicators.bindings.collectives import DTYPES

_HERE = Path(__file__).parent / "emulated_gpu"
_NATIVE = Path(__file__).parents[2] / "native"
_CODECS = tuple(quick_codecs.CODECS)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    target = tmp_path_factory.mktemp("emulated") / "quick.so"
    command = [
        "c++", "-std=c++20", "-O1", "-pthread", "-shared", "-fPIC", "-ffp-contract=off",
        f"-I{_HERE}", f"-I{_NATIVE}", "-x", "c++", str(_NATIVE / "collectives/quick_all_reduce.cu"),
        str(_HERE / "quick.cpp"), "-o", str(target),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = ctypes.CDLL(str(target))
    pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_uint64
    loaded.quick_open.restype = pointer
    loaded.quick_open.argtypes = (number, size, ctypes.c_double)
    loaded.quick_run.restype = ctypes.c_char_p
    loaded.quick_run.argtypes = (
        pointer, number, number, ctypes.POINTER(pointer), ctypes.POINTER(pointer), size, number,
        number, number,
    )  # fmt: skip
    loaded.quick_close.argtypes = (pointer,)
    return loaded


class Ranks:
    def __init__(self, library: ctypes.CDLL, world_size: int, area: int, timeout_s: float) -> None:
        self.library, self.world_size = library, world_size
        self.handle = library.quick_open(world_size, area, timeout_s)

    def run(
        self,
        inputs: list[torch.Tensor],
        outputs: list[torch.Tensor],
        codec: str,
        blocks: int = 2,
        ahead: int = 1,
        present: int | None = None,
    ) -> str | None:
        def addresses(tensors: list[torch.Tensor]) -> ctypes.Array[ctypes.c_void_p]:
            return (ctypes.c_void_p * len(tensors))(*(x.data_ptr() for x in tensors))

        wrong = self.library.quick_run(
            self.handle,
            _CODECS.index(codec),
            DTYPES[inputs[0].dtype],
            addresses(inputs),
            addresses(outputs),
            inputs[0].nbytes,
            self.world_size if present is None else present,
            blocks,
            ahead,
        )
        return wrong.decode() if wrong is not None else None

    def close(self) -> None:
        self.library.quick_close(self.handle)


def hard_inputs(world_size: int, count: int, dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    """Normal numbers, random bits, and words of nothing but the largest code."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(world_size, count, generator=generator).to(dtype)
    bits = torch.randint(-32768, 32768, (world_size, count // 4), generator=generator)
    inputs[:, : count // 4] = bits.to(torch.int16).view(dtype)
    ones = torch.where(torch.rand(world_size, count // 4, generator=generator) < 0.03, 1.0, -1.0)
    inputs[:, count // 4 : count // 4 * 2] = ones.to(dtype)
    inputs[:, : count // 4 // 2][inputs[:, : count // 4 // 2].isnan()] = -1
    return list(inputs)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    nan = a.isnan() & b.isnan()
    return bool(((a.view(torch.int16) == b.view(torch.int16)) | nan).all())


@pytest.mark.parametrize("world_size", [2, 4, 8])
@pytest.mark.parametrize("codec", _CODECS)
def test_the_bits_of_the_model(library: ctypes.CDLL, codec: str, world_size: int) -> None:
    ranks = Ranks(library, world_size, 128 << 10, timeout_s=60)
    counts = (1, 16384, 20_003) if world_size == 2 else (17_000,) if world_size == 4 else (16384,)
    for turn, count in enumerate(counts):
        for dtype in (torch.float16, torch.bfloat16):
            inputs = hard_inputs(world_size, count, dtype, turn)
            expected = quick_codecs.all_reduce(inputs, codec)
            outputs = [torch.full_like(x, torch.nan) for x in inputs]
            if turn % 2 or world_size > 2:
                outputs = inputs  # in place
            wrong = ranks.run(inputs, outputs, codec, blocks=3 - turn, ahead=1 + turn)
            assert wrong is None
            assert all(same(out, expected) for out in outputs), (count, dtype)
    ranks.close()


def test_codecs_and_grids_in_turn(library: ctypes.CDLL) -> None:
    """More than an area holds, too: several launches a call."""
    ranks = Ranks(library, 2, 40 << 10, timeout_s=60)
    for turn in range(6):
        codec = _CODECS[turn % 4]
        inputs = hard_inputs(2, 9000 * (1 + turn % 3), torch.bfloat16, turn)
        expected = quick_codecs.all_reduce(inputs, codec)
        assert ranks.run(inputs, inputs, codec, blocks=1 + turn % 4, ahead=1 + turn % 3) is None
        assert all(same(out, expected) for out in inputs), turn
    ranks.close()


def test_a_missing_rank_is_reported(library: ctypes.CDLL) -> None:
    ranks = Ranks(library, 4, 64 << 10, timeout_s=0.2)
    inputs = hard_inputs(4, 2048, torch.float16, 0)
    wrong = ranks.run(inputs, inputs, "Q6", blocks=1, present=3)
    assert wrong is not None and wrong.endswith("waited for rank 3"), wrong
    ranks.close()
