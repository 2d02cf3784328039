"""Every op on a GPU against its reference, captured in CUDA graphs, and against torch's formats."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import kvcache_ops
from kvcache_ops import reference
from tests.unit.ops.ops_cases import all_cases, sample
from tests.unit.ops.ops_checks import assert_same_memory, check
from tests.unit.ops.ops_maker import FLOATS, Args, Case, storage


@pytest.mark.parametrize("case", all_cases(), ids=str)
def test_against_reference(case: Case) -> None:
    check(case, "cuda")


def tensors(args: Args) -> dict[str, torch.Tensor]:
    return {k: v for k, v in args.items() if isinstance(v, torch.Tensor)}


@pytest.mark.parametrize("case", [c for c in sample(6) if c.op != "swap_blocks"], ids=str)
def test_graph_replay_with_changed_contents(case: Case) -> None:
    """A captured call, replayed after its inputs have changed, computes the new result."""
    args = case.args("cuda")
    saved = {k: storage(v).clone() for k, v in tensors(args).items()}
    op = getattr(kvcache_ops, case.op)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        op(**args)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        op(**args)
    changed = Case(case.op, case.name, case.build, case.seed + 1000, case.ulps, case.atol)
    for fresh in (changed.args("cuda"), None):
        if fresh is None:  # and back to the first contents
            for name, value in tensors(args).items():
                storage(value).copy_(saved[name])
            expected = case.args("cuda")
        else:
            if any(storage(v).numel() != saved[k].numel() for k, v in tensors(fresh).items()):
                continue
            for name, value in tensors(args).items():
                storage(value).copy_(storage(fresh[name]))
            expected = fresh
        graph.replay()
        getattr(reference, case.op)(**expected)
        for name, value in tensors(args).items():
            assert_same_memory(case, name, value, expected[name])


@pytest.mark.parametrize("hidden", [1032, 2048, 4096, 5000, 8192, 16384])
@pytest.mark.parametrize("fused", [False, True])
def test_a_norm_has_the_same_bits_among_few_rows_and_many(hidden: int, fused: bool) -> None:
    """Rows are spread over several blocks where they are few, and over one where they are many."""
    torch.manual_seed(0)
    x, residual = torch.randn(2, 600, hidden, device="cuda").bfloat16()
    weight = torch.randn(hidden, device="cuda").bfloat16()

    def norm(rows: int) -> torch.Tensor:
        out, added = x[:rows].clone(), residual[:rows].clone()
        if fused:
            kvcache_ops.fused_add_rms_norm(out, added, weight, 1e-5)
        else:
            kvcache_ops.rms_norm(out, x[:rows], weight, 1e-5)
        return torch.cat([out, added])

    many = norm(600)
    for rows in (1, 2, 8, 9, 16, 17, 32, 33):
        few = norm(rows)
        assert torch.equal(few[:rows], many[:rows])
        assert torch.equal(few[rows:], many[600 : 600 + rows])


@pytest.mark.parametrize("rows", [1, 4, 16])
def test_a_norm_in_place(rows: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(rows, 8192, device="cuda").bfloat16()
    weight = torch.randn(8192, device="cuda").bfloat16()
    expected = torch.empty_like(x)
    kvcache_ops.rms_norm(expected, x, weight, 1e-5)
    for _ in range(200):
        y = x.clone()
        kvcache_ops.rms_norm(y, y, weight, 1e-5)
        assert torch.equal(y, expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_silu_has_the_bits_of_torch(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(512, 2 * 1024, device="cuda") * 4).to(dtype)
    out = torch.empty(512, 1024, device="cuda", dtype=dtype)
    kvcache_ops.silu_and_mul(out, x)
    assert torch.equal(out, F.silu(x[:, :1024]) * x[:, 1024:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_silu_of_every_16_bit_value(dtype: torch.dtype) -> None:
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).cuda()
    out = torch.empty_like(x)
    kvcache_ops.silu_and_mul(out, torch.cat([x, torch.ones_like(x)]))
    expected = F.silu(x) * 1
    ordinary = ~expected.isnan()
    assert torch.equal(out.isnan(), ~ordinary)
    assert torch.equal(out[ordinary].view(torch.int16), expected[ordinary].view(torch.int16))


@pytest.mark.parametrize("rows", [1, 2, 300, 5000])
@pytest.mark.parametrize("hidden", [128, 2048, 4096, 5120, 8192])
def test_a_row_of_rms_norm_has_the_same_bits_in_every_batch(rows: int, hidden: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(rows, hidden, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(hidden, device="cuda", dtype=torch.bfloat16)
    together, alone = torch.empty_like(x), torch.empty(1, hidden, device="cuda").to(x.dtype)
    kvcache_ops.rms_norm(together, x, weight, 1e-5)
    z, y = torch.zeros_like(x), x.clone()
    kvcache_ops.fused_add_rms_norm(y, z, weight, 1e-5)
    assert torch.equal(y, together)
    for i in {0, rows // 2, rows - 1}:
        kvcache_ops.rms_norm(alone, x[i : i + 1], weight, 1e-5)
        assert torch.equal(alone[0], together[i])


@pytest.mark.parametrize(
    ("kv_dtype", "fmt"), [("fp8", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2)]
)
@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0123, 3.7, 1e-6, 1e30])
def test_fp8_of_random_bits(kv_dtype: str, fmt: torch.dtype, scale: float) -> None:
    generator = torch.Generator().manual_seed(7)
    bits = torch.randint(-(2**31), 2**31, (2_000_003,), generator=generator).to(torch.int32)
    x = bits.view(torch.float32)
    x = x[~x.isnan()].cuda()
    largest, s = torch.finfo(fmt).max, torch.tensor(scale, device="cuda")
    expected = (x / s).clamp(-largest, largest).to(fmt).view(torch.uint8)
    out = torch.empty(x.numel(), dtype=torch.uint8, device="cuda")
    kvcache_ops.convert_fp8(out, x, scale, kv_dtype)
    assert torch.equal(out, expected)


def every_16_bit_value(dtype: torch.dtype) -> torch.Tensor:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    return bits.view(dtype).cuda()


def fp8_scales() -> list[float]:
    """Ordinary ones, decimal ones, ratios of small integers (whose quotients lie on the edges
    between codes), powers of two, and the two ends of fp32, subnormal numbers included."""
    generator = torch.Generator().manual_seed(11)
    random = torch.empty(300).uniform_(-60, 60, generator=generator).exp2().tolist()
    decimal = [i / 100 for i in range(1, 120)] + [0.001, 0.003, 0.007, 1.3e-3, 448.0, 3.7, 9.9]
    ratios = [a / b for a in (1, 3, 5, 7, 11, 21, 255) for b in (1, 3, 9, 17, 31)]
    ends = [2.0**e for e in (-149, -140, -126, -100, 1, 100, 127)] + [1e-45, 3e-39, 1e-30, 1e30]
    return [*random, *decimal, *ratios, *ends, 3e38, float("inf"), -0.7, -1.0, -1e-40]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kv", ["fp8", "fp8_e5m2"])
def test_fp8_of_every_16_bit_value(dtype: torch.dtype, kv: str) -> None:
    """Whichever way a kernel divides by the scale."""
    x = every_16_bit_value(dtype)
    got = torch.empty(x.numel(), dtype=torch.uint8, device="cuda")
    want = torch.empty_like(got)
    for scale in fp8_scales():
        kvcache_ops.convert_fp8(got, x, scale, kv)
        reference.convert_fp8(want, x, scale, kv)
        assert torch.equal(got, want), scale


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cache_writes_of_every_16_bit_value(dtype: torch.dtype) -> None:
    """Two scales in one kernel, of which either or none may need an exact division; and one a
    head."""
    x = every_16_bit_value(dtype).view(64, 8, 128)
    slots = torch.arange(64, device="cuda")
    got = [torch.zeros(4, 16, 8, 128, device="cuda", dtype=torch.uint8) for _ in "kv"]
    want = [t.clone() for t in got]
    scales = fp8_scales()
    for key_scale, value_scale in zip(scales, reversed(scales), strict=True):
        for n in (1, 8):
            k, v = (torch.full((n,), s, device="cuda") for s in (key_scale, value_scale))
            if n == 8:
                k[3], v[5] = 0.7, 0.3
            kvcache_ops.reshape_and_cache_flash(x, x, got[0], got[1], slots, "fp8", k, v)
            reference.reshape_and_cache_flash(x, x, want[0], want[1], slots, "fp8", k, v)
            assert all(map(torch.equal, got, want)), (key_scale, value_scale, n)


@pytest.mark.parametrize("kv", ["auto", "fp8"])
@pytest.mark.parametrize("how", ["dense", "expanded", "padded", "transposed"])
def test_grouped_is_one_write_a_layer(kv: str, how: str) -> None:
    layers, tokens, dt = 3, 37, torch.bfloat16 if kv == "auto" else torch.uint8

    def laid_out(x: torch.Tensor) -> torch.Tensor:
        if how == "expanded":  # all layers share what the first one has
            return x[:1].expand_as(x)
        if how == "padded":
            return torch.cat([x, x], -1)[..., : x.shape[-1]]
        return x.transpose(0, 1).contiguous().transpose(0, 1) if how == "transposed" else x

    kv_c = laid_out(torch.randn(layers, tokens, 512, device="cuda", dtype=torch.bfloat16))
    k_pe = laid_out(torch.randn(layers, tokens, 64, device="cuda", dtype=torch.bfloat16))
    got = torch.zeros(layers, 5, 16, 576, device="cuda", dtype=dt)
    want = torch.zeros_like(got)
    slots = torch.stack([torch.randperm(80, device="cuda")[:tokens] - 1 for _ in range(layers)])
    slots = laid_out(slots)
    scales = torch.tensor([0.7, 0.3, 1.0], device="cuda")
    at = torch.tensor([t.data_ptr() for t in got], device="cuda")
    kvcache_ops.concat_and_cache_mla_grouped(
        kv_c, k_pe, at, slots, 16, 16 * 576, 576, scales, kv_cache_dtype=kv
    )
    for i in range(layers):
        reference.concat_and_cache_mla(kv_c[i], k_pe[i], want[i], slots[i], kv, scales[i : i + 1])
    assert torch.equal(got, want)


def test_cpu_and_gpu_agree_on_devices() -> None:
    """A tensor on the wrong device is named."""
    x = torch.randn(2, 64, device="cuda")
    with pytest.raises(RuntimeError, match=r"rms_norm\(weight\).*on cpu was given.*on cuda:0"):
        kvcache_ops.rms_norm(torch.empty_like(x), x, torch.randn(64), 1e-5)


@pytest.mark.parametrize("pinned", [True, False])
def test_swap_blocks_between_host_and_gpu(pinned: bool) -> None:
    host = torch.randint(0, 255, (9, 4096), dtype=torch.uint8)
    host = host.pin_memory() if pinned else host
    gpu = torch.zeros(9, 4096, dtype=torch.uint8, device="cuda")
    pairs = torch.tensor([[0, 3], [8, 0], [4, 8]])
    kvcache_ops.swap_blocks(host, gpu, 4096, pairs)
    torch.cuda.synchronize()
    assert torch.equal(gpu.cpu()[pairs[:, 1]], host[pairs[:, 0]])
    back = torch.zeros_like(host)
    back = back.pin_memory() if pinned else back
    kvcache_ops.swap_blocks(gpu, back, 4096, pairs.flip(1))
    torch.cuda.synchronize()
    assert torch.equal(back[pairs[:, 0]], host[pairs[:, 0]])


def test_swap_blocks_in_a_graph() -> None:
    """Blocks of the GPU, captured: a replay moves what they hold by then."""
    a = torch.randint(0, 255, (9, 4096), dtype=torch.uint8, device="cuda")
    b = torch.zeros_like(a)
    pairs = torch.tensor([[0, 3], [8, 0], [4, 8]])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kvcache_ops.swap_blocks(a, b, 4096, pairs)
    for _ in range(2):
        a.random_(0, 255)
        graph.replay()
        assert torch.equal(b[pairs[:, 1]], a[pairs[:, 0]])


@pytest.mark.parametrize("own_stream", [True, False])
def test_swap_blocks_batch(own_stream: bool) -> None:
    host = torch.randint(0, 255, (5, 1000), dtype=torch.uint8).pin_memory()
    gpu = torch.zeros(5, 1000, dtype=torch.uint8, device="cuda")
    src = torch.tensor([host[i].data_ptr() for i in range(5)])
    dst = torch.tensor([gpu[4 - i].data_ptr() for i in range(5)])
    sizes = torch.tensor([1000, 0, 1000, 10, 1000])
    torch.cuda.synchronize()
    stream = torch.cuda.Stream() if own_stream else torch.cuda.current_stream()
    with torch.cuda.stream(stream):
        kvcache_ops.swap_blocks_batch(src, dst, sizes)
    torch.cuda.synchronize()
    expected = torch.zeros(5, 1000, dtype=torch.uint8)
    for i, n in enumerate(sizes.tolist()):
        expected[4 - i, :n] = host[i, :n]
    assert torch.equal(gpu.cpu(), expected)


def batch(sources: list[torch.Tensor], targets: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return (
        torch.tensor([t.data_ptr() for t in sources]),
        torch.tensor([t.data_ptr() for t in targets]),
        torch.tensor([t.nbytes for t in sources]),
    )


def test_swap_blocks_batch_in_a_graph() -> None:
    """The addresses are those of the capture; a replay moves what they hold by then."""
    sources = [torch.zeros(1000, dtype=torch.uint8).pin_memory()]
    sources += [torch.zeros(77, dtype=torch.uint8, device="cuda")]
    targets = [torch.zeros_like(t, device="cuda") for t in sources]
    numbers = batch(sources, targets)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kvcache_ops.swap_blocks_batch(*numbers)
    for t in numbers:
        t.zero_()  # they are read when the call is captured
    for _ in range(2):
        for t in sources:
            t.random_(0, 255)
        torch.cuda.synchronize()
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(sources, targets, strict=True))


def test_swap_blocks_batch_compiled() -> None:
    source = torch.randint(0, 255, (1000,), dtype=torch.uint8, device="cuda")
    target = torch.zeros_like(source)
    numbers = batch([source], [target])
    compiled = torch.compile(kvcache_ops.swap_blocks_batch, fullgraph=True, backend="aot_eager")
    compiled(*numbers)
    torch.cuda.synchronize()
    assert torch.equal(source, target)
    op = torch.ops.kvcache_ops.swap_blocks_batch_cuda
    torch.library.opcheck(op, numbers, test_utils=("test_schema", "test_faketensor"))
