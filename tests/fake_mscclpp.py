"""A stand-in for the `mscclpp` package: the same surface, ranks as threads, memory of the host.

It checks nothing that the package does not check: a broken limit is noted in `problems`, where the
real one would sum wrongly, write past its buffer or hang.
"""

from __future__ import annotations

import ctypes
import enum
import sys
import threading
import types
import uuid
from typing import Any

import torch

problems: list[str] = []
failing: set[tuple[str, int, int]] = set()  # (algorithm, rank, blocks): execute returns an error
wrong: set[tuple[str, int, int]] = set()  # ... gives a wrong sum
ran: set[str] = set()
ranks_per_node: list[int] = []  # what the bootstrap reports, when set
_worlds: dict[bytes, World] = {}
_lock = threading.Lock()
_NAMES = [
    f"default_allreduce_{name}"
    for name in ("nvls_packet", "nvls_zero_copy", "allpair_packet", "packet", "rsag", "fullmesh")
] + ["default_allgather_fullmesh"]


class World:
    def __init__(self, size):
        self.size, self.barrier = size, threading.Barrier(size)
        self.slots: list = [None] * size

    def exchange(self, rank, value):
        self.slots[rank] = value
        self.barrier.wait(20)
        values = list(self.slots)
        self.barrier.wait(20)
        return values


class CppUniqueId:
    def __init__(self):
        self.ready = True

    def __getstate__(self):
        return self.value

    def __setstate__(self, value):
        assert not hasattr(self, "ready"), "nanobind refuses __setstate__ after __init__"
        assert isinstance(value, bytes) and len(value) == 128
        self.value = value


class TcpBootstrap:
    @staticmethod
    def create_unique_id():
        identity = CppUniqueId.__new__(CppUniqueId)
        identity.__setstate__(uuid.uuid4().bytes * 8)
        return identity

    rank: int
    size: int

    @staticmethod
    def create(rank, size):
        self = TcpBootstrap()
        self.rank, self.size = rank, size
        return self

    def initialize(self, identity, timeout_sec):
        assert isinstance(timeout_sec, int)
        with _lock:
            self.world = _worlds.setdefault(identity.value, World(self.size))
        self.world.barrier.wait(20)

    def get_n_ranks_per_node(self):
        return ranks_per_node[0] if ranks_per_node else self.size


class Communicator:
    def __init__(self, bootstrap):
        self.bootstrap = bootstrap


class RawGpuBuffer:
    def __init__(self, nbytes):
        self.memory = torch.zeros(nbytes, dtype=torch.uint8)

    def data(self):
        return self.memory.data_ptr()

    def bytes(self):
        return self.memory.nbytes


class DataType(enum.Enum):
    float16 = 1
    bfloat16 = 2
    float32 = 3
    uint8 = 4


class ReduceOp(enum.Enum):
    SUM = 0
    NOP = 3


class CommResult(enum.Enum):
    COMM_SUCCESS = 0
    COMM_INVALID_ARGUMENT = 4


def _view(pointer, nbytes, dtype):
    raw = (ctypes.c_uint8 * nbytes).from_address(pointer)
    return torch.frombuffer(raw, dtype=getattr(torch, dtype.name))


class Algorithm:
    def __init__(self, name, scratch_bytes, flags, rank):
        self.name, self.scratch_bytes, self.flags, self.rank = name, scratch_bytes, flags, rank
        self.collective = "allgather" if "allgather" in name else "allreduce"

    def execute(
        self, comm, inp, out, in_bytes, out_bytes, dtype, op=ReduceOp.NOP, stream=0,
        executor=None, nblocks=0, nthreads_per_block=0,
    ):  # fmt: skip
        world, short = comm.bootstrap.world, self.name.replace("default_allreduce_", "")
        ran.add(self.name)
        self._note_broken_limits(short, inp, out, in_bytes, nblocks, world.size)
        words = (ctypes.c_uint32 * 128).from_address(self.flags)
        if short.endswith("packet"):
            seen = world.exchange(self.rank, list(words))
            if any(words_of != seen[0] for words_of in seen) or 0 in seen[0]:
                problems.append(f"{short}: the ranks wait for flags {[s[0] for s in seen]}")
            for index in range(128):
                words[index] += 1
        parts = world.exchange(self.rank, _view(inp, in_bytes, dtype).clone())
        target = _view(out, out_bytes, dtype)
        if self.collective == "allgather":
            assert op is ReduceOp.NOP
            target.copy_(torch.cat(parts))
        else:
            assert op is ReduceOp.SUM
            total = parts[self.rank]  # own part first, then the peers', in the tensor's dtype
            for part in parts[: self.rank] + parts[self.rank + 1 :]:
                total = total + part
            target.copy_(total)
        world.barrier.wait(20)
        if (short, self.rank, nblocks) in wrong:
            target[-1] += 1
        if (short, self.rank, nblocks) in failing:
            return CommResult.COMM_INVALID_ARGUMENT
        return CommResult.COMM_SUCCESS

    def _note_broken_limits(self, short, inp, out, nbytes, nblocks, w):
        broken = {
            "allpair_packet": nbytes * 4 * w > self.scratch_bytes or nbytes % 4,
            "packet": nbytes % (8 * w) or nbytes * 12 > self.scratch_bytes or nblocks % (w - 1),
            "rsag": inp % 16 or out % 16 or nbytes > self.scratch_bytes,
            "default_allgather_fullmesh": nbytes % 16
            or inp % 16
            or min(nbytes, 56 * 1024 * 64) * w > self.scratch_bytes,
        }.get(short, True)
        if broken:
            problems.append(f"{short}: {nbytes} bytes, {nblocks} blocks, {w} ranks, {inp:#x}")


class CppAlgorithmCollectionBuilder:
    @staticmethod
    def get_instance():
        return CppAlgorithmCollectionBuilder()

    def build_default_algorithms(
        self, scratch_buffer, scratch_buffer_size, flag_buffer, flag_buffer_size, rank
    ):
        assert scratch_buffer and flag_buffer_size == 512
        return [Algorithm(name, scratch_buffer_size, flag_buffer, rank) for name in _NAMES]


def AlgorithmCollection(native):
    return list(native)


def install(monkeypatch):
    """Makes `import mscclpp` find this; forgets what earlier tests left."""
    for container in (problems, failing, wrong, ran, ranks_per_node):
        container.clear()
    native: Any = types.ModuleType("mscclpp._mscclpp")
    native.CppUniqueId, native.CppAlgorithmCollectionBuilder = (
        CppUniqueId,
        CppAlgorithmCollectionBuilder,
    )
    package: Any = types.ModuleType("mscclpp")
    package._mscclpp = native
    for value in (TcpBootstrap, Communicator, RawGpuBuffer, DataType, ReduceOp):
        setattr(package, value.__name__, value)
    package.AlgorithmCollection = AlgorithmCollection
    monkeypatch.setitem(sys.modules, "mscclpp", package)
    monkeypatch.setitem(sys.modules, "mscclpp._mscclpp", native)
    return package
