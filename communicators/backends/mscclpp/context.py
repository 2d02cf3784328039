"""MscclppContext: one communicator of Microsoft's `mscclpp` package, and what its limits are.

The package (https://github.com/microsoft/mscclpp) brings collective algorithms as objects with one
`execute`. It leaves to its caller what each of them can take; those limits, read off its kernels
(src/ext/collectives), stand below and are checked before every call. Violating one is no error
there but a wrong sum, an overrun or a hang. Its own waits on the device have no deadline.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ...base import Refusal
from ...errors import CommunicatorError, InvalidArgumentError

#: A packet algorithm counts its calls in this many 32-bit words, one per block; they start as 1.
_FLAGS = 128
#: all_gather moves blocks x threads x 64 bytes per rank at a time through the scratch buffer.
_GATHER_BLOCKS, _GATHER_THREADS = 56, 1024  # the most that it takes
UNIQUE_ID_BYTES = 128

DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}


@dataclass(frozen=True)
class Algorithm:
    """One of the package's algorithms, and what it can take. All facts are equal on all ranks.

    Attributes:
        package_name: its name in the package.
        fits: (bytes per rank, world size, scratch bytes) -> why not, or None.
        launches: (blocks, threads per block) worth trying for a world size.
        accepts: (blocks, threads, world size) -> whether that launch is sound.
    """

    package_name: str
    fits: Callable[[int, int, int], str | None]
    launches: Callable[[int], list[tuple[int, int]]]
    accepts: Callable[[int, int, int], bool]


def _fits_allpair(nbytes: int, world_size: int, scratch: int) -> str | None:
    if nbytes % 4:
        return f"{nbytes} bytes are not a multiple of 4"
    limit = scratch // (4 * world_size)  # two halves; W messages of 8-byte packets for 4 of data
    return f"{nbytes} bytes are more than its {limit}" if nbytes > limit else None


def _fits_packet(nbytes: int, world_size: int, scratch: int) -> str | None:
    if nbytes % (8 * world_size):
        return f"{nbytes} bytes are not a multiple of 8 x {world_size} ranks"
    limit = scratch // 12  # two halves; inputs and results as packets of twice their size, and gaps
    return f"{nbytes} bytes are more than its {limit}" if nbytes > limit else None


def _fits_rsag(nbytes: int, world_size: int, scratch: int) -> str | None:
    return f"{nbytes} bytes are more than its {scratch}" if nbytes > scratch else None


def _fits_fullmesh(nbytes: int, world_size: int, scratch: int) -> str | None:
    if nbytes % 16:
        return f"{nbytes} bytes are not a multiple of 16"
    chunk = min(nbytes, _GATHER_BLOCKS * _GATHER_THREADS * 64)
    needed = world_size * chunk
    return f"it needs {needed} bytes of scratch, of {scratch}" if needed > scratch else None


#: packet deals its blocks to the peers: with a count that is no multiple of W - 1 the last ones
#: address a peer that is not there. allpair_packet gives a warp of each block to a peer.
ALGORITHMS = {
    "allpair_packet": Algorithm(
        "default_allreduce_allpair_packet",
        _fits_allpair,
        lambda w: [(blocks, 512) for blocks in (4, 8, 16, 32)],
        lambda blocks, threads, w: blocks <= 64 and threads % 32 == 0 and threads // 32 >= w - 1,
    ),
    "packet": Algorithm(
        "default_allreduce_packet",
        _fits_packet,
        lambda w: [((w - 1) * k, 512) for k in (4, 8, 16, 32) if (w - 1) * k <= 112],
        lambda blocks, threads, w: blocks <= 112 and blocks % (w - 1) == 0 and threads % 32 == 0,
    ),
    "rsag": Algorithm(
        "default_allreduce_rsag",
        _fits_rsag,
        lambda w: [(16, 1024), (32, 1024), (64, 1024)],
        lambda blocks, threads, w: blocks <= 64 and threads >= w - 1,
    ),
    "fullmesh": Algorithm(
        "default_allgather_fullmesh",
        _fits_fullmesh,
        lambda w: [(_GATHER_BLOCKS, _GATHER_THREADS)],
        lambda blocks, threads, w: (blocks, threads) == (_GATHER_BLOCKS, _GATHER_THREADS),
    ),
}


def load_package() -> Any:
    """The `mscclpp` package, or a Refusal that says what is missing."""
    try:
        package = importlib.import_module("mscclpp")
        importlib.import_module("mscclpp._mscclpp")
    except (ImportError, OSError) as error:
        return Refusal(
            f"the Python package mscclpp cannot be imported ({error}); it is built from its "
            "repository, see docs/mscclpp.md"
        )
    for name in ("TcpBootstrap", "Communicator", "RawGpuBuffer", "AlgorithmCollection", "DataType"):
        if not hasattr(package, name):
            return Refusal(f"this mscclpp package has no {name}; one with its algorithms is needed")
    return package


def new_unique_id(package: Any) -> bytes:
    """The 128 bytes by which the ranks of a communicator find each other; made on one rank."""
    return bytes(package.TcpBootstrap.create_unique_id().__getstate__())


class MscclppContext:
    """A communicator of the package over one scratch buffer. Construction is collective.

    Args:
        package: the imported `mscclpp`.
        unique_id: from new_unique_id, the same on all ranks.
        scratch, scratch_bytes: device memory that peers may map, not used by anybody else.
        device: where the flags go, and the tensors are.
        timeout_s: seconds to find the other ranks in.
    Raises CommunicatorError when the ranks are not all on one host.
    """

    def __init__(
        self,
        package: Any,
        unique_id: bytes,
        rank: int,
        world_size: int,
        scratch: int,
        scratch_bytes: int,
        device: torch.device,
        timeout_s: float,
    ) -> None:
        self.package, self.rank, self.world_size = package, rank, world_size
        self.scratch_bytes = scratch_bytes
        self.device = device
        id_type = package._mscclpp.CppUniqueId
        identity = id_type.__new__(id_type)  # as unpickling does it; no other way in from bytes
        identity.__setstate__(unique_id)
        bootstrap = package.TcpBootstrap.create(rank, world_size)
        bootstrap.initialize(identity, max(1, int(timeout_s)))
        if bootstrap.get_n_ranks_per_node() != world_size:
            raise CommunicatorError(
                f"rank {rank}: {bootstrap.get_n_ranks_per_node()} of the {world_size} ranks are on "
                "this host; its algorithms that are used here need all of them on one"
            )
        self.communicator = package.Communicator(bootstrap)
        # The package's own flags are one buffer per process: two communicators would count each
        # other's calls. So the flags are ours, and the builder beneath its Python class is used.
        self.flags = torch.ones(_FLAGS, dtype=torch.int32, device=device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        native = package._mscclpp.CppAlgorithmCollectionBuilder.get_instance()
        collection = package.AlgorithmCollection(
            native.build_default_algorithms(
                scratch_buffer=scratch,
                scratch_buffer_size=scratch_bytes,
                flag_buffer=self.flags.data_ptr(),
                flag_buffer_size=self.flags.nbytes,
                rank=rank,
            )
        )
        built = {algorithm.name: algorithm for algorithm in collection}
        self.algorithms = {
            name: built[algorithm.package_name]
            for name, algorithm in ALGORITHMS.items()
            if algorithm.package_name in built
        }
        if not self.algorithms:
            raise CommunicatorError(
                f"rank {rank}: the mscclpp package has none of "
                f"{', '.join(a.package_name for a in ALGORITHMS.values())}, but {sorted(built)}"
            )
        self._ran: set[str] = set()
        self.captured = False  # CUDA graphs may read its memory

    def why_not(self, name: str, nbytes: int) -> str | None:
        """Why algorithm `name` cannot take `nbytes` a rank, or None. Equal on all ranks."""
        if name not in self.algorithms:
            return "this mscclpp package does not have it"
        return ALGORITHMS[name].fits(nbytes, self.world_size, self.scratch_bytes)

    def execute(
        self,
        name: str,
        inp: torch.Tensor,
        out: torch.Tensor,
        nblocks: int = 0,
        nthreads: int = 0,
    ) -> None:
        """Launches one collective on the current stream.

        Args:
            inp, out: contiguous, at 16-byte addresses, of one dtype of DTYPES.
            nblocks, nthreads: the launch; 0 leaves it to the package.
        """
        reason = self.why_not(name, inp.nbytes)
        if reason is not None:
            raise InvalidArgumentError(f"mscclpp {name} on rank {self.rank}: {reason}")
        launch_given = nblocks > 0 and nthreads > 0
        if launch_given and not (
            nthreads <= 1024 and ALGORITHMS[name].accepts(nblocks, nthreads, self.world_size)
        ):
            raise InvalidArgumentError(
                f"mscclpp {name} on rank {self.rank}: {nblocks} blocks of {nthreads} threads are "
                f"no launch for {self.world_size} ranks; for instance "
                f"{ALGORITHMS[name].launches(self.world_size)} are"
            )
        for argument, tensor in (("inp", inp), ("out", out)):
            if tensor.data_ptr() % 16 or not tensor.is_contiguous():
                raise InvalidArgumentError(
                    f"mscclpp {name} on rank {self.rank}: {argument} must be contiguous and start "
                    f"at a multiple of 16 bytes; it starts at {tensor.data_ptr():#x}"
                )
        stream = 0
        if self.device.type == "cuda":
            stream = torch.cuda.current_stream(self.device).cuda_stream
            if torch.cuda.is_current_stream_capturing():
                if name not in self._ran:
                    raise CommunicatorError(
                        f"mscclpp {name} on rank {self.rank}: its first call connects the ranks "
                        "and cannot be captured; run it once before"
                    )
                self.captured = True
        gathers = name == "fullmesh"
        operation = self.package.ReduceOp.NOP if gathers else self.package.ReduceOp.SUM
        code = self.algorithms[name].execute(
            self.communicator,
            inp.data_ptr(),
            out.data_ptr(),
            inp.nbytes,
            out.nbytes,
            getattr(self.package.DataType, DTYPES.get(inp.dtype, "uint8")),
            operation,
            stream,
            nblocks=nblocks,
            nthreads_per_block=nthreads,
        )
        value = code.value if hasattr(code, "value") else int(code)
        if value != 0:
            raise CommunicatorError(
                f"mscclpp {name} of {inp.nbytes} bytes with {nblocks} x {nthreads} threads failed "
                f"on rank {self.rank}: {code}"
            )
        self._ran.add(name)

    def close(self) -> None:
        """Drops the package's objects; it frees them when nothing refers to them."""
        self.algorithms = {}
        self.communicator = None
