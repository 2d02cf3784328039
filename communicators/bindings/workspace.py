"""Device memory that all ranks of a node map: allocate, exchange handles, map, close.

A buffer is cudaMalloc memory, which CUDA IPC can share whatever allocator torch is configured with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ..errors import CommunicatorError, InvalidArgumentError
from . import native

#: Bytes of a slot, of a region for LL packets and of a bulk region. A workspace has two of each
#: and 64 KB of control words (native/collectives/workspace.h): 50 MB.
LAYOUT = (16 << 20, 1 << 20, 8 << 20)


@dataclass
class SharedBuffer:
    """One buffer per rank, each mapped into this process.

    Attributes:
        pointers: this process's address of every rank's buffer, in rank order. Empty before
            `map_peers` and after `close`.
        handle: what the peers map this rank's buffer with (64 bytes, cudaIpcMemHandle_t).
    """

    nbytes: int
    device: torch.device
    rank: int
    handle: bytes
    own: int
    pointers: list[int] = field(default_factory=list)

    @classmethod
    def allocate(cls, nbytes: int, device: torch.device, rank: int) -> SharedBuffer:
        """Takes `nbytes` of zeroed memory on `device`. Local; CommunicatorError when it fails."""
        native.load("cuda")
        if nbytes <= 0:
            raise InvalidArgumentError(f"a shared buffer of {nbytes} bytes: it must be positive")
        with torch.cuda.device(device):
            try:
                own, handle = torch.ops.communicators.allocate_shared_buffer_and_handle(nbytes)
            except RuntimeError as error:
                raise CommunicatorError(
                    f"rank {rank} cannot share {nbytes} bytes of {device}: {error}"
                ) from error
        return cls(nbytes, device, rank, bytes(handle.tolist()), own)

    def map_peers(self, handles: Sequence[bytes], own: int = 0) -> None:
        """Maps every peer's buffer. Local; on failure nothing stays mapped.

        Args:
            handles: one per rank, in rank order, this rank's own included.
            own: address of this rank's memory when somebody else owns it.
        """
        mapped: list[int] = []
        with torch.cuda.device(self.device):
            for rank, handle in enumerate(handles):
                if rank == self.rank:
                    mapped.append(own or self.own)
                    continue
                as_tensor = torch.frombuffer(bytearray(handle), dtype=torch.uint8)
                try:
                    mapped.append(torch.ops.communicators.open_mem_handle(as_tensor))
                except RuntimeError as error:
                    self._unmap(mapped)
                    raise CommunicatorError(
                        f"rank {self.rank} on {self.device} cannot map the memory of rank {rank}: "
                        f"{error}"
                    ) from error
        self.pointers = mapped

    def close(self) -> None:
        """Unmaps the peers' buffers and frees this rank's. Idempotent, no communication."""
        with torch.cuda.device(self.device):
            self._unmap(self.pointers)
            self.pointers = []
            if self.own:
                torch.ops.communicators.free_shared_buffer(self.own)
                self.own = 0

    def _unmap(self, pointers: Sequence[int]) -> None:
        for rank, pointer in enumerate(pointers):
            if rank != self.rank:
                torch.ops.communicators.close_mem_handle(pointer)
