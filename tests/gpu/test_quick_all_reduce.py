"""The quantized all-reduce at world sizes 2, 4 and 8 on one GPU, against the model, bit for bit.

The model runs on the GPU too, which is quicker by far; one test shows that it gives the same bits
there as on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from communicators.backends.quick import codecs as quick_codecs
from communicators.bindings import collectives
from communicators.bindings.workspace import SharedBuffer
from communicators.errors import CommTimeoutError, CommunicatorError

pytestmark = pytest.mark.gpu

if not torch.cuda.is_available():
    pytest.skip("no CUDA GPU", allow_module_level=True)

WORLDS = (2, 4, 8)
DTYPES = (torch.float16, torch.bfloat16)
#: Elements: one, less than a vector, a block, a row, a tile and one more, many tiles.
SIZES = (1, 7, 32, 2048, 16384, 16385, 100_003, 1_000_000)
AREA = 18 << 20


class QuickRanks:
    """W ranks on the current device, a stream each; their kernels are resident together."""

    def __init__(
        self, world_size: int, area: int = AREA, timeout_s: float = 5.0, ahead: int = 1
    ) -> None:
        self.library = collectives.load()
        device = torch.device("cuda", torch.cuda.current_device())
        nbytes = self.library.quick_ar_bytes(area)
        self.buffers = [SharedBuffer.allocate(nbytes, device, r) for r in range(world_size)]
        pointers = [buffer.own for buffer in self.buffers]
        self.handles = [self.library.create_quick_ar(pointers, r, area) for r in range(world_size)]
        self.streams = [torch.cuda.Stream() for _ in range(world_size)]
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        for handle in self.handles:
            self.library.gpu_set_timeout_ns(handle, int(timeout_s * 1e9))
            blocks = processors // world_size
            self.library.quick_ar_set_launch(handle, blocks, 128, ahead, 0)

    def all_reduce(
        self,
        inputs: Sequence[torch.Tensor],
        outputs: Sequence[torch.Tensor],
        codec: str,
        ranks: Sequence[int] | None = None,
    ) -> None:
        current = torch.cuda.current_stream()
        ranks = range(len(self.handles)) if ranks is None else ranks
        for rank in ranks:
            self.streams[rank].wait_stream(current)
            self.library.check(
                self.library.quick_ar_all_reduce(
                    self.handles[rank],
                    collectives.CODECS.index(codec),
                    collectives.DTYPES[inputs[rank].dtype],
                    inputs[rank].data_ptr(),
                    outputs[rank].data_ptr(),
                    inputs[rank].nbytes,
                    self.streams[rank].cuda_stream,
                )
            )
        for rank in ranks:
            current.wait_stream(self.streams[rank])

    def check(self) -> None:
        torch.cuda.synchronize()
        for handle in self.handles:
            self.library.gpu_check(handle)

    def __enter__(self) -> QuickRanks:
        return self

    def __exit__(self, *_: object) -> None:
        torch.cuda.synchronize()
        for handle in self.handles:
            self.library.gpu_destroy(handle)
        for buffer in self.buffers:
            buffer.close()


def random_inputs(
    world_size: int, count: int, dtype: torch.dtype, seed: int = 0
) -> list[torch.Tensor]:
    """Blocks of many magnitudes, drawn on the current GPU; the same on every GPU of its kind."""
    generator = torch.Generator("cuda").manual_seed(seed)
    spread = torch.randn(world_size, count, generator=generator, device="cuda")
    exponents = torch.randint(
        -12, 8, (world_size, count // 32 + 1), generator=generator, device="cuda"
    )
    scaled = spread * torch.exp2(exponents).repeat_interleave(32, 1)[:, :count]
    return list(scaled.to(dtype))


def bit_patterns(world_size: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Every bit pattern; in the first part of the tensor rank 0 holds 0.5 instead."""
    generator = torch.Generator("cuda").manual_seed(1)
    shape = (world_size, 70_000)
    bits = torch.randint(-32768, 32768, shape, generator=generator, device="cuda")
    inputs = bits.to(torch.int16).view(dtype)
    inputs[0, :40_000] = 0.5
    return list(inputs)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    nan = a.isnan() & b.isnan()
    return bool(((a.view(torch.int16) == b.view(torch.int16)) | nan).all())


@pytest.fixture(params=WORLDS, scope="module")
def ranks(request: pytest.FixtureRequest):
    with QuickRanks(request.param) as made:
        yield made


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", collectives.CODECS)
def test_the_bits_of_the_model(ranks: QuickRanks, codec: str, dtype: torch.dtype) -> None:
    world_size = len(ranks.handles)
    for seed, count in enumerate(SIZES):
        inputs = random_inputs(world_size, count, dtype, seed)
        expected = quick_codecs.all_reduce(inputs, codec)
        outputs = [torch.full_like(x, torch.nan) for x in inputs]
        ranks.all_reduce(inputs, outputs, codec)
        ranks.check()
        assert all(same(out, expected) for out in outputs), count
        ranks.all_reduce(inputs, inputs, codec)
        ranks.check()
        assert all(same(out, expected) for out in inputs), f"{count} in place"


@pytest.mark.parametrize("codec", collectives.CODECS)
def test_every_bit_pattern(ranks: QuickRanks, codec: str) -> None:
    for dtype in DTYPES:
        inputs = bit_patterns(len(ranks.handles), dtype)
        expected = quick_codecs.all_reduce(inputs, codec)
        ranks.all_reduce(inputs, inputs, codec)
        ranks.check()
        assert all(same(out, expected) for out in inputs)


@pytest.mark.parametrize("codec", collectives.CODECS)
def test_the_model_gives_the_same_bits_on_a_gpu_as_on_the_cpu(codec: str) -> None:
    for dtype in DTYPES:
        for inputs in (bit_patterns(4, dtype), random_inputs(4, 100_003, dtype)):
            on_cpu = quick_codecs.all_reduce([x.cpu() for x in inputs], codec)
            assert same(quick_codecs.all_reduce(inputs, codec).cpu(), on_cpu), dtype


@pytest.mark.parametrize("codec", collectives.CODECS)
def test_messages_longer_than_an_area_and_alternating_codecs(codec: str) -> None:
    for world_size in WORLDS:
        with QuickRanks(world_size, area=200 << 10) as ranks:
            for seed, other in enumerate(collectives.CODECS):
                for chosen, count in ((other, 999_999), (codec, 400_001)):
                    inputs = random_inputs(world_size, count, torch.bfloat16, seed)
                    # Each launch of a long message starts with a whole tile, as the model does.
                    expected = quick_codecs.all_reduce(inputs, chosen)
                    ranks.all_reduce(inputs, inputs, chosen)
                    ranks.check()
                    assert all(same(out, expected) for out in inputs), (chosen, count)


def test_pointers_that_are_aligned_to_an_element(ranks: QuickRanks) -> None:
    inputs = random_inputs(len(ranks.handles), 20_000, torch.bfloat16)
    expected = quick_codecs.all_reduce(inputs, "Q6")
    given = [torch.cat([x.new_zeros(1), x])[1:] for x in inputs]
    ranks.all_reduce(given, given, "Q6")
    ranks.check()
    assert all(same(out, expected) for out in given)


def test_a_graph_replays_between_eager_calls(ranks: QuickRanks) -> None:
    world_size = len(ranks.handles)
    static = [torch.zeros(50_000, dtype=torch.float16, device="cuda") for _ in range(world_size)]
    outputs = [torch.empty_like(x) for x in static]
    ranks.all_reduce(static, outputs, "Q8")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ranks.all_reduce(static, outputs, "Q8")
        ranks.all_reduce(outputs, outputs, "Q4")
    for turn in range(6):
        inputs = random_inputs(world_size, 50_000, torch.float16, turn)
        for place, x in zip(static, inputs, strict=True):
            place.copy_(x)
        if turn % 2:
            ranks.all_reduce(static, static, "FP")
            inputs = [quick_codecs.all_reduce(inputs, "FP")] * world_size
        graph.replay()
        ranks.check()
        once = quick_codecs.all_reduce(inputs, "Q8")
        expected = quick_codecs.all_reduce([once] * world_size, "Q4")
        assert all(same(out, expected) for out in outputs), turn


@pytest.mark.parametrize("world_size", WORLDS)
def test_a_rank_that_does_not_come_is_named(world_size: int) -> None:
    late = world_size - 1
    with QuickRanks(world_size, timeout_s=0.5) as ranks:
        inputs = random_inputs(world_size, 1000, torch.bfloat16)
        ranks.all_reduce(inputs, inputs, "Q8", ranks=range(world_size - 1))
        torch.cuda.synchronize()
        for rank in range(world_size - 1):
            with pytest.raises(CommTimeoutError, match=rf"on rank {rank} .* for rank {late} "):
                ranks.library.gpu_check(ranks.handles[rank])


def test_two_calls_in_flight_are_an_error() -> None:
    with QuickRanks(2, timeout_s=2.0) as ranks:
        inputs = random_inputs(2, 1000, torch.bfloat16)
        others = [x.clone() for x in inputs]
        ranks.all_reduce(inputs, inputs, "Q8", ranks=[0])  # waits for rank 1
        ranks.streams[0] = torch.cuda.Stream()
        current = torch.cuda.Stream()
        with torch.cuda.stream(current):
            ranks.all_reduce(others, others, "Q8", ranks=[0])
        torch.cuda.synchronize()
        with pytest.raises(CommunicatorError, match="another call in flight"):
            ranks.library.gpu_check(ranks.handles[0])
