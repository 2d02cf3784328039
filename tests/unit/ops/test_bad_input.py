"""Each argument of each op wrong once: the error says op, argument, given and accepted, and nothing
has been written."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import kvcache_ops
from kvcache_ops import _native
from tests.unit.ops.ops_cases import cpu_cases
from tests.unit.ops.ops_maker import Args, Case, behind, storage


def wrong_dtype(t: Tensor) -> Tensor:
    return t.to(torch.float64 if t.dtype.is_floating_point else torch.int16)


def wrong_rank(t: Tensor) -> Tensor:
    return t.unsqueeze(0)


def wrong_stride(t: Tensor) -> Tensor:
    wide = torch.zeros(*t.shape, 2, dtype=t.dtype, device=t.device)
    wide[..., 0] = t
    return wide[..., 0]


def wrong_size(t: Tensor) -> Tensor:
    return t.narrow(-1, 0, t.shape[-1] - 1)


def wrong_device(t: Tensor) -> Tensor:
    return t.to("meta")


MUTATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "device": wrong_device,
    "dtype": wrong_dtype,
    "rank": wrong_rank,
    "stride": wrong_stride,
    "size": wrong_size,
}
# What is accepted on purpose: (op or *, argument, mutation).
ACCEPTED = {
    ("*", "slot_mapping", "size"),  # fewer tokens than rows
    ("*", "block_table", "size"),  # a narrower table
    ("*", "block_tables", "size"),
    ("*", "scale", "rank"),  # one element of any rank
    ("*", "k_scale", "rank"),
    ("*", "v_scale", "rank"),
    ("*", "kv_cache_scale", "rank"),
    ("*", "output_scale", "rank"),
    ("*", "prefix_lse", "stride"),  # strides are honoured
    ("*", "suffix_lse", "stride"),
    ("*", "output_lse", "stride"),
    ("*", "out_lse", "stride"),
    ("swap_blocks", "block_mapping", "stride"),
    ("concat_and_cache_mla_grouped", "slot_mapping", "stride"),
    ("concat_and_cache_mla_grouped", "kv_scales", "rank"),  # one element a layer, of any rank
    ("convert_fp8", "input", "rank"),  # memory of any shape
    ("convert_fp8", "output", "rank"),
    ("concat_and_cache_mla_grouped", "kv_c", "size"),  # entries in wider rows
    ("concat_and_cache_mla_grouped", "k_pe", "size"),
    ("gather_and_maybe_dequant_cache", "cu_seq_lens", "size"),  # fewer sequences than rows
    ("cp_gather_indexer_k_quant_cache", "cu_seq_lens", "size"),
    ("rms_norm", "input", "stride"),  # copied
    ("swap_blocks", "src", "dtype"),  # bytes of any dtype and shape
    ("swap_blocks", "dst", "dtype"),
    ("swap_blocks", "src", "rank"),
    ("swap_blocks", "dst", "rank"),
    ("swap_blocks", "src", "stride"),
    ("swap_blocks", "dst", "stride"),
    ("swap_blocks", "src", "size"),
    ("swap_blocks", "dst", "size"),
    ("concat_and_cache_mla_rope_fused", "positions", "size"),  # N > T
    ("cp_gather_indexer_k_quant_cache", "dst_scale", "stride"),  # a single column
}
ONE_OF_EACH = {
    "rms_norm": "float32-(5, 33)-row-dense",
    "fused_add_rms_norm": "float32-(5, 33)-row-dense",
    "rotary_embedding": "float32-flat-4-4-64-32-True",
    "reshape_and_cache_flash": "bfloat16-fp8-5-16-2-64-NHD-dense",
    "reshape_and_cache": "bfloat16-fp8-5-16-2-64-False",
    "concat_and_cache_mla": "bfloat16-fp8-5-16-512-64-dense",
    "concat_and_cache_mla_rope_fused": "bfloat16-fp8-5-16-512-64-dense",
    "convert_fp8": "quantize-float32-fp8-5003",
    "gather_and_maybe_dequant_cache": "float32-fp8-22-16-576-21",
    "cp_gather_cache": "float32-22-16-576-21",
    "cp_gather_and_upconvert_fp8_kv_cache": "22-64-21-host",
    "indexer_k_quant_and_cache": "bfloat16-ue8m0-64",
    "cp_gather_indexer_k_quant_cache": "60-4-64-32",
    "swap_blocks": "7-24",
    "merge_attn_states": "float32-7-4-128-0",
    "paged_attention": "bfloat16-fp8-HND-38-6-6-16-128",
    "paged_attention_v1": "float32-fp8-38-8-2-32-45",
    "paged_attention_v2": "float32-fp8-38-8-2-32-45",
    "concat_and_cache_mla_grouped": "3-5-3-16-512-64-fp8-scaled",
    "swap_blocks_batch": "7-24",
}

# Where two arguments contradict each other the error may name the other one; and the schema calls
# some arguments otherwise than the Python function.
ALSO_NAMED = {
    ("rms_norm", "out"): ("result",),
    ("convert_fp8", "output"): ("dst_cache", "input"),
    ("convert_fp8", "input"): ("src_cache", "output"),
    ("concat_and_cache_mla", "kv_c"): ("kv_cache",),
    ("concat_and_cache_mla", "k_pe"): ("kv_cache",),
    ("concat_and_cache_mla_rope_fused", "kv_c"): ("kv_cache",),
    ("concat_and_cache_mla_rope_fused", "k_pe"): ("kv_cache",),
    ("cp_gather_and_upconvert_fp8_kv_cache", "device_row_ids"): ("host_row_ids",),
    ("cp_gather_indexer_k_quant_cache", "dst_scale"): ("kv_cache",),
    ("gather_and_maybe_dequant_cache", "src_cache"): ("dst",),
    ("swap_blocks", "block_size_in_bytes"): ("block_mapping",),
}


@functools.cache
def base_cases() -> list[Case]:
    chosen: dict[str, Case] = {}
    for case in cpu_cases():
        wanted = ONE_OF_EACH.get(case.op)
        if case.name == wanted or (wanted is None and case.op not in chosen):
            chosen[case.op] = case
    return list(chosen.values())


def assert_refused(case: Case, args: Args, argument: str) -> None:
    watched = {k: v for k, v in args.items() if isinstance(v, Tensor) and v.device.type == "cpu"}
    for k, v in list(watched.items()):
        watched.update({f"{k}[{i}]": t for i, t in enumerate(behind(v))})
    before = {k: storage(v).clone() for k, v in watched.items()}
    with pytest.raises(RuntimeError) as caught:
        getattr(kvcache_ops, case.op)(**args)
    message = str(caught.value).split("Exception raised")[0]
    assert f"{case.op}(" in message, message
    named = {argument, *ALSO_NAMED.get((case.op, argument), ())}
    assert any(re.search(rf"\b{n}\b", message) for n in named), f"{argument}: {message}"
    assert "given" in message and "accepted" in message, message
    for name, memory in before.items():
        same = torch.equal(storage(watched[name]).view(torch.uint8), memory.view(torch.uint8))
        assert same, f"{case}: {name} was written although {argument} was refused"


def wrong_arguments() -> list[tuple[Case, str, str]]:
    found = []
    for case in base_cases():
        for name, value in case.args().items():
            if not isinstance(value, Tensor) or value.dim() == 0:
                continue
            for mutation in MUTATIONS:
                single = value.numel() == 1
                if single and mutation in ("size", "stride"):
                    continue
                if {(case.op, name, mutation), ("*", name, mutation)} & ACCEPTED:
                    continue
                found.append((case, name, mutation))
    return found


@pytest.mark.parametrize(("case", "name", "mutation"), wrong_arguments(), ids=str)
def test_wrong_tensor(case: Case, name: str, mutation: str) -> None:
    args = case.args()
    args[name] = MUTATIONS[mutation](args[name])
    assert_refused(case, args, name)


SCALARS = [
    ("*", "kv_cache_dtype", "int4"),
    ("*", "kv_dtype", "auto"),
    ("rotary_embedding", "head_size", 0),
    ("rotary_embedding", "rope_dim_offset", 40),
    ("rotary_embedding", "rope_dim_offset", -1),
    ("gather_and_maybe_dequant_cache", "num_tokens", -1),
    ("gather_and_maybe_dequant_cache", "num_tokens", 1 << 40),
    ("cp_gather_cache", "batch_size", 17),
    ("cp_gather_and_upconvert_fp8_kv_cache", "batch_size", 17),
    ("cp_gather_and_upconvert_fp8_kv_cache", "host_cache", None),
    ("indexer_k_quant_and_cache", "quant_block_size", 16),
    ("swap_blocks", "block_size_in_bytes", 0),
    ("swap_blocks", "block_size_in_bytes", 4096),
    ("paged_attention_v1", "num_kv_heads", 3),
    ("paged_attention_v1", "block_size", 5),
    ("paged_attention_v1", "max_seq_len", -1),
    ("paged_attention_v2", "num_kv_heads", 3),
    ("paged_attention_v2", "max_seq_len", 1 << 20),
    ("merge_attn_states", "prefill_tokens_with_context", -1),
    ("merge_attn_states", "prefill_tokens_with_context", 99),
    ("merge_attn_states", "output_scale", torch.ones(1)),
    ("concat_and_cache_mla_grouped", "block_size", 0),
    ("concat_and_cache_mla_grouped", "block_stride", -1),
    ("concat_and_cache_mla_grouped", "entry_stride", 575),
    ("paged_attention_v2", "block_size", 5),
]
# Right whatever their value is.
ANY_VALUE = {
    "epsilon",
    "is_neox",
    "inverse",
    "alpha",
    "limit",
    "threshold",
    "skip_scale",
    "is_src_access_order_any",
    "scale",  # of convert_fp8 and of the logits
    "tp_rank",
    "blocksparse_local_blocks",
    "blocksparse_vert_stride",
    "blocksparse_head_sliding_step",
}


@pytest.mark.parametrize(("op", "name", "value"), SCALARS, ids=str)
def test_wrong_scalar(op: str, name: str, value: object) -> None:
    cases = [
        c for c in base_cases() if op in ("*", c.op) and name in {**c.args(), "output_scale": 0}
    ]
    assert cases
    for case in cases if op == "*" else [c for c in cases if c.op == op]:
        args = case.args()
        args[name] = value
        assert_refused(case, args, name)


def test_interleaved_values_need_whole_chunks() -> None:
    case = next(c for c in cpu_cases() if c.op == "reshape_and_cache" and "fp8" in c.name)
    args = case.args()
    for name in ("key_cache", "value_cache"):  # blocks of 8, where 16 codes lie together
        args[name] = args[name].narrow(3, 0, 8).contiguous()
    args["interleaved_v"] = True
    assert_refused(case, args, "interleaved_v")


def test_sparse_block_that_no_cache_block_divides() -> None:
    for op in ("paged_attention_v1", "paged_attention_v2"):
        case = next(c for c in base_cases() if c.op == op)
        args = dict(case.args(), blocksparse_vert_stride=2, blocksparse_block_size=5)
        assert_refused(case, args, "blocksparse_block_size")


def test_every_argument_of_every_op_is_wrong_once() -> None:
    bases, mutated = base_cases(), wrong_arguments()
    assert {case.op for case in bases} == set(kvcache_ops.__all__)
    tried = {(c.op, name) for c, name, _ in mutated}
    tried |= {(c.op, n) for o, n, _ in SCALARS for c in bases if o in ("*", c.op)}
    # These in tests of their own:
    tried |= {(op, "blocksparse_block_size") for op in ("paged_attention_v1", "paged_attention_v2")}
    tried.add(("reshape_and_cache", "interleaved_v"))
    for case in bases:
        args = case.args()
        for name in inspect.signature(getattr(kvcache_ops, case.op)).parameters:
            assert (case.op, name) in tried or name in ANY_VALUE, f"{case.op}({name})"
            value = args.get(name)
            if isinstance(value, Tensor):
                kinds = {m for c, n, m in mutated if (c.op, n) == (case.op, name)}
                kinds |= {m for o, n, m in ACCEPTED if o in ("*", case.op) and n == name}
                expected = set(MUTATIONS) - ({"size", "stride"} if value.numel() == 1 else set())
                assert kinds >= expected, f"{case.op}({name}): {expected - kinds}"


@pytest.mark.parametrize(
    ("name", "view"),
    [
        ("input", lambda t: t[:, :1].expand(6, 4)),
        ("output", lambda t: t[:, :1].expand(6, 4)),
        ("output", lambda t: t[:1].expand(6, 4)),
        ("input", lambda t: t.as_strided((6, 4), (2, 1))),  # rows overlap
        ("input", lambda t: t.as_strided((6, 4), (1, 1))),
        ("output", lambda t: t.as_strided((2, 3, 4), (12, 4, 0))),
        ("input", lambda t: torch.cat([t, t], 1)[:, :4]),  # holes
        ("output", lambda t: torch.cat([t, t])[::2]),
        ("output", lambda t: torch.cat([t, t], 1)[:, 1:5].permute(1, 0)),
        ("output", lambda t: t[:5]),  # elements are missing
        ("output", lambda t: t.view(4, 6).t()),  # the shape of input in another order
        ("input", lambda t: t.t().contiguous().t()),
    ],
)
@pytest.mark.parametrize("to_codes", [True, False])
def test_convert_fp8_of_what_is_no_row_of_memory(
    name: str, view: Callable[[Tensor], Tensor], to_codes: bool
) -> None:
    floats = torch.arange(24, dtype=torch.bfloat16).view(6, 4)
    codes = torch.arange(24, dtype=torch.uint8).view(6, 4)
    args = dict(output=codes, input=floats) if to_codes else dict(output=floats, input=codes)
    args[name] = view(args[name])
    assert_refused(Case("convert_fp8", "", lambda m: {}), args, name)


def test_convert_fp8_in_place() -> None:
    memory = torch.ones(64)
    for args in (
        dict(output=memory.view(torch.uint8)[:64], input=memory),
        dict(output=memory.view(torch.uint8)[192:], input=memory),
        dict(output=memory[32:], input=memory.view(torch.uint8)[128:160]),
    ):
        assert_refused(Case("convert_fp8", "", lambda m: {}), args, "output")
    halves = memory.view(torch.uint8)  # beside each other they do not meet
    kvcache_ops.convert_fp8(halves[128:160], memory[:32])
    assert halves[128:160].unique().tolist() == [56]


def test_swap_blocks_refuses_overlap() -> None:
    memory = torch.arange(64, dtype=torch.uint8)
    before = memory.clone()
    with pytest.raises(RuntimeError, match=r"swap_blocks\(block_mapping\): row 1"):
        kvcache_ops.swap_blocks(memory, memory, 16, torch.tensor([[0, 1], [1, 2]]))
    assert torch.equal(memory, before)
    kvcache_ops.swap_blocks(memory, memory, 16, torch.tensor([[0, 2], [1, 3]]))
    assert torch.equal(memory[32:], before[:32])


def test_swap_blocks_batch_refuses() -> None:
    at = torch.tensor([0])
    with pytest.raises(RuntimeError, match=r"swap_blocks_batch\(sizes\): -1 was given"):
        kvcache_ops.swap_blocks_batch(at, at, torch.tensor([-1]))
    with pytest.raises(RuntimeError, match=r"swap_blocks_batch\(dst_ptrs\): int32 was given"):
        kvcache_ops.swap_blocks_batch(at, at.int(), at)
    empty = torch.tensor([], dtype=torch.int64)
    kvcache_ops.swap_blocks_batch(empty, empty, empty)


def test_slots_past_the_cache_raise_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    _native._load("cpu")
    monkeypatch.setattr(_native, "_check_slots", True)
    k, one = torch.zeros(2, 1, 8), torch.ones(1)
    cache = torch.zeros(2, 4, 1, 8)
    with pytest.raises(IndexError, match="token 1 has slot 8; the cache has slots 0 to 7"):
        kvcache_ops.reshape_and_cache_flash(
            k + 1, k, cache, cache.clone(), torch.tensor([0, 8]), "auto", one, one
        )
    assert not cache.any()
