"""W ranks on one GPU in one process: W workspaces, W communicators, W streams.

The kernels take raw pointers, so world sizes that no machine at hand has can run on one GPU. The
kernels of all ranks wait for each other, so all their blocks must be resident at once: the number
of blocks a rank is capped, and programmatic dependent launch, which lets later kernels take places
early, is off.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from types import TracebackType

import torch

from communicators.bindings import collectives
from communicators.bindings.workspace import LAYOUT, SharedBuffer


class VirtualRanks:
    """W communicators on the current device.

    Args:
        world_size: 2, 4, 6 or 8.
        timeout_s: deadline of the waits on the device; by default 5 s, or what
            COMMUNICATORS_TIMEOUT_S says (compute-sanitizer makes kernels very slow).
        layout: bytes of (slot, ll, bulk); small ones make messages take several pieces.
    """

    def __init__(
        self,
        world_size: int,
        timeout_s: float | None = None,
        layout: tuple[int, int, int] = LAYOUT,
    ) -> None:
        if timeout_s is None:
            timeout_s = float(os.environ.get("COMMUNICATORS_TIMEOUT_S", "5"))
        self.world_size = world_size
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.library = collectives.load()
        nbytes = self.library.custom_ar_bytes(*layout)
        self.buffers = [SharedBuffer.allocate(nbytes, self.device, r) for r in range(world_size)]
        self.pointers = [buffer.own for buffer in self.buffers]
        self.handles = [
            self.library.create_custom_ar(self.pointers, r, layout) for r in range(world_size)
        ]
        self.streams = [torch.cuda.Stream() for _ in range(world_size)]
        # The largest kernels fill a multiprocessor with one block, and a rank has three roles.
        processors = torch.cuda.get_device_properties(self.device).multi_processor_count
        blocks = max(processors // (3 * world_size), 1)
        for handle in self.handles:
            self.library.gpu_set_timeout_ns(handle, int(timeout_s * 1e9))
        self.tune(overlap=0, blocks=blocks, other_blocks=blocks)

    def tune(self, **choices: int) -> None:
        for handle in self.handles:
            for name, value in choices.items():
                self.library.tune(handle, name, value)

    def each(self, launch: Callable[[int, int, int], int]) -> None:
        """launch(rank, handle, stream) for every rank on its own stream; then waits and checks."""
        current = torch.cuda.current_stream()
        for rank, stream in enumerate(self.streams):
            stream.wait_stream(current)
            self.library.check(launch(rank, self.handles[rank], stream.cuda_stream))
        for stream in self.streams:
            current.wait_stream(stream)

    def check(self) -> None:
        torch.cuda.synchronize()
        for handle in self.handles:
            self.library.gpu_check(handle)

    def all_reduce(self, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
        self.each(
            lambda rank, handle, stream: self.library.custom_ar_all_reduce(
                handle,
                collectives.DTYPES[inputs[rank].dtype],
                inputs[rank].data_ptr(),
                outputs[rank].data_ptr(),
                inputs[rank].nbytes,
                stream,
            )
        )

    def all_gather(self, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
        self.each(
            lambda rank, handle, stream: self.library.custom_ar_all_gather(
                handle,
                inputs[rank].data_ptr(),
                outputs[rank].data_ptr(),
                inputs[rank].nbytes,
                stream,
            )
        )

    def reduce_scatter(
        self, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]
    ) -> None:
        self.each(
            lambda rank, handle, stream: self.library.custom_ar_reduce_scatter(
                handle,
                collectives.DTYPES[inputs[rank].dtype],
                inputs[rank].data_ptr(),
                outputs[rank].data_ptr(),
                outputs[rank].nbytes,
                stream,
            )
        )

    def close(self) -> None:
        torch.cuda.synchronize()
        for handle in self.handles:
            self.library.gpu_destroy(handle)
        for buffer in self.buffers:
            buffer.close()

    def __enter__(self) -> VirtualRanks:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def rank_ordered_sum(inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """The one reference of all sums: rank order, fp32, rounded once."""
    total = inputs[0].float()
    for one in inputs[1:]:
        total = total + one.float()
    return total.to(inputs[0].dtype)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bit for bit, where any NaN equals any other NaN."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    nan = torch.isnan(a) & torch.isnan(b)
    return bool(((a.view(integers) == b.view(integers)) | nan).all())
