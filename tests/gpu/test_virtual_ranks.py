"""Every kernel of CustomAllreduce at world sizes 2, 4, 6 and 8 on one GPU."""

from __future__ import annotations

import pytest
import torch

from communicators.bindings import collectives
from communicators.errors import CommTimeoutError, CommunicatorError
from tests.gpu.virtual_ranks import VirtualRanks, rank_ordered_sum, same_bits

pytestmark = pytest.mark.gpu

if not torch.cuda.is_available():
    pytest.skip("no CUDA GPU", allow_module_level=True)

WORLDS = (2, 4, 6, 8)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ONE_SHOT, STREAMED, TWO_SHOT = 1, 2, 3
ALGORITHMS = [
    (world, algorithm)
    for world in WORLDS
    for algorithm in (ONE_SHOT, STREAMED, TWO_SHOT)
    if world == 2 or algorithm in (ONE_SHOT, TWO_SHOT)
]
#: Elements: one, less than a vector, less than one a rank, odd, prime, whole vectors.
SIZES = (1, 3, 8, 17, 64, 999, 1024, 4099, 65536, 262147)
SMALL = (256 << 10, 16 << 10, 64 << 10)  # a workspace that larger messages go through in pieces


@pytest.fixture(params=WORLDS, scope="module")
def ranks(request: pytest.FixtureRequest):
    with VirtualRanks(request.param) as made:
        yield made


def random_inputs(world: int, count: int, dtype: torch.dtype) -> list[torch.Tensor]:
    return [torch.randn(count, device="cuda").to(dtype) for _ in range(world)]


def poisoned(like: list[torch.Tensor], count: int) -> list[torch.Tensor]:
    return [torch.full((count,), float("nan"), dtype=x.dtype, device=x.device) for x in like]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("world", "algorithm"), ALGORITHMS)
def test_all_reduce(world: int, algorithm: int, dtype: torch.dtype) -> None:
    with VirtualRanks(world) as ranks:
        ranks.tune(algorithm=algorithm)
        for count in SIZES:
            inputs = random_inputs(world, count, dtype)
            expected = rank_ordered_sum(inputs)
            outputs = poisoned(inputs, count)
            ranks.all_reduce(inputs, outputs)
            ranks.check()
            assert all(torch.equal(out, expected) for out in outputs), count
            ranks.all_reduce(inputs, inputs)
            ranks.check()
            assert all(torch.equal(out, expected) for out in inputs), f"{count} in place"


@pytest.mark.parametrize(("world", "algorithm"), ALGORITHMS)
def test_in_pieces(world: int, algorithm: int) -> None:
    with VirtualRanks(world, layout=SMALL) as ranks:
        ranks.tune(algorithm=algorithm)
        for count in (100_003, 1_000_000, 3_000_017):
            inputs = random_inputs(world, count, torch.bfloat16)
            expected = rank_ordered_sum(inputs)
            outputs = poisoned(inputs, count)
            ranks.all_reduce(inputs, outputs)
            ranks.all_reduce(inputs, inputs)
            ranks.check()
            assert all(torch.equal(out, expected) for out in [*outputs, *inputs]), count


def test_algorithms_alternate(ranks: VirtualRanks) -> None:
    """Slots and counters left by one algorithm serve the next."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(60):
        count = int(torch.randint(1, 200_000, (1,), generator=generator))
        ranks.tune(algorithm=int(torch.randint(0, 4, (1,), generator=generator)))
        inputs = random_inputs(ranks.world_size, count, torch.bfloat16)
        outputs = poisoned(inputs, count)
        ranks.all_reduce(inputs, outputs)
        gathered = poisoned(inputs, count * ranks.world_size)
        ranks.all_gather(inputs, gathered)
        ranks.check()
        assert all(torch.equal(out, rank_ordered_sum(inputs)) for out in outputs)
        assert all(torch.equal(out, torch.cat(inputs)) for out in gathered)
    ranks.tune(algorithm=0)


@pytest.mark.parametrize("offset", (1, 3))
def test_unaligned(ranks: VirtualRanks, offset: int) -> None:
    for algorithm in (ONE_SHOT, TWO_SHOT, STREAMED):
        ranks.tune(algorithm=algorithm)
        for count in (5, 4096, 50_001):
            inputs = [x[offset:] for x in random_inputs(ranks.world_size, count, torch.float16)]
            outputs = [x[offset + 1 :] for x in poisoned(inputs, count + 1)]
            inputs[0] = inputs[0].clone()  # one rank aligned, the others not
            ranks.all_reduce(inputs, outputs)
            ranks.check()
            assert all(torch.equal(out, rank_ordered_sum(inputs)) for out in outputs)
    ranks.tune(algorithm=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_pattern(ranks: VirtualRanks, dtype: torch.dtype) -> None:
    """Random bits, infinities, -0.0, NaNs and the pattern that stands for an empty slot."""
    integers = torch.int32 if dtype == torch.float32 else torch.int16
    for algorithm in (ONE_SHOT, TWO_SHOT, STREAMED):
        ranks.tune(algorithm=algorithm)
        for special in ("random", "empty", "zero", "infinity"):
            inputs = []
            for rank in range(ranks.world_size):
                bits = torch.randint(-(2**31), 2**31 - 1, (40_000,), device="cuda").to(integers)
                x = bits.view(dtype)
                if special == "empty" and rank % 2 == 0:
                    x = torch.full_like(bits, -1).view(dtype)
                if special == "zero":
                    x = torch.full_like(x, -0.0)
                if special == "infinity":
                    x = torch.full_like(x, float("inf") if rank else float("-inf"))
                inputs.append(x)
            outputs = poisoned(inputs, 40_000)
            ranks.all_reduce(inputs, outputs)
            ranks.check()
            expected = rank_ordered_sum(inputs)
            assert all(same_bits(out, expected) for out in outputs), special
            integer = [out.view(integers) for out in outputs]
            assert all(torch.equal(out, integer[0]) for out in integer), f"{special} across ranks"
    ranks.tune(algorithm=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reduce_scatter(ranks: VirtualRanks, dtype: torch.dtype) -> None:
    for count in (1, 7, 8, 1000, 65536, 300_001):
        inputs = random_inputs(ranks.world_size, count * ranks.world_size, dtype)
        outputs = poisoned(inputs, count)
        ranks.reduce_scatter(inputs, outputs)
        ranks.check()
        parts = rank_ordered_sum(inputs).view(ranks.world_size, count)
        assert all(torch.equal(out, parts[r]) for r, out in enumerate(outputs)), count


@pytest.mark.parametrize("dtype", (torch.uint8, torch.int16, torch.float32, torch.int64))
def test_all_gather_keeps_every_bit(ranks: VirtualRanks, dtype: torch.dtype) -> None:
    for small_most in (1 << 30, 0):  # LL packets where they fit; bulk
        ranks.tune(gather_small_most=small_most)
        for count in (1, 13, 16, 1000, 4099, 300_000):
            bits = torch.randint(0, 256, (ranks.world_size, count * dtype.itemsize))
            bits[0] = 255
            inputs = [row.to(torch.uint8).cuda().view(dtype) for row in bits]
            outputs = [torch.zeros(count * ranks.world_size, dtype=dtype, device="cuda")
                       for _ in inputs]  # fmt: skip
            ranks.all_gather(inputs, outputs)
            ranks.check()
            expected = torch.cat(inputs).view(torch.uint8)
            assert all(torch.equal(out.view(torch.uint8), expected) for out in outputs), count
    ranks.tune(gather_small_most=128 << 10)


def test_a_missing_rank_is_named() -> None:
    for world in WORLDS:
        algorithms = (1, 2, 3) if world == 2 else (1, 3)
        for algorithm in algorithms:
            with VirtualRanks(world, timeout_s=0.2) as ranks:
                ranks.tune(algorithm=algorithm)
                x = torch.ones(50_000, device="cuda")
                late = world - 1

                def launch(
                    rank: int, handle: int, stream: int, late: int = late,
                    ranks: VirtualRanks = ranks, x: torch.Tensor = x,
                ) -> int:  # fmt: skip
                    if rank == late:
                        return 0
                    return ranks.library.custom_ar_all_reduce(
                        handle,
                        collectives.DTYPES[x.dtype],
                        x.data_ptr(),
                        x.data_ptr(),
                        x.nbytes,
                        stream,
                    )

                ranks.each(launch)
                with pytest.raises(CommTimeoutError, match=f"for rank {late}"):
                    ranks.check()
                with pytest.raises(CommTimeoutError, match=f"on rank 0 of {world}"):
                    ranks.all_reduce([x] * world, [x] * world)
    # The context is as good as before.
    assert torch.ones(10, device="cuda").sum().item() == 10


def test_two_streams_at_once() -> None:
    with VirtualRanks(2, timeout_s=2.0) as ranks:
        x = torch.ones(1000, device="cuda")
        other = torch.cuda.Stream()
        arguments = (collectives.DTYPES[x.dtype], x.data_ptr(), x.data_ptr(), x.nbytes)
        handle = ranks.handles[0]
        ranks.library.check(
            ranks.library.custom_ar_all_reduce(handle, *arguments, ranks.streams[0].cuda_stream)
        )
        ranks.library.check(
            ranks.library.custom_ar_all_reduce(handle, *arguments, other.cuda_stream)
        )
        with pytest.raises(CommunicatorError, match="another call in flight"):
            ranks.check()


def test_graph_replays_between_eager_calls(ranks: VirtualRanks) -> None:
    world = ranks.world_size
    inputs = random_inputs(world, 5000, torch.bfloat16)
    outputs = poisoned(inputs, 5000)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            ranks.all_reduce(inputs, outputs)
    for turn in range(7):
        for x in inputs:
            x.copy_(torch.randn(5000, device="cuda"))
        graph.replay()
        ranks.check()
        assert all(torch.equal(out, rank_ordered_sum(inputs)) for out in outputs), turn
        if turn % 3 == 0:
            eager = poisoned(inputs, 5000)
            ranks.all_reduce(inputs, eager)
            ranks.check()
            assert all(torch.equal(out, outputs[0]) for out in eager)
