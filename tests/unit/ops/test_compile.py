"""The ops under torch's own checks of custom operators and under torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kvcache_ops
from kvcache_ops import _native
from tests.unit.ops.ops_cases import cpu_cases, sample
from tests.unit.ops.ops_checks import assert_same_memory
from tests.unit.ops.ops_maker import Args, Case, behind


def schema_arguments(op: Any, case: Case, args: Args) -> tuple[tuple[Any, ...], Args]:
    """The arguments in the order of the schema, its keyword-only ones apart."""
    names = {"convert_fp8": {"dst_cache": "output", "src_cache": "input"}}.get(case.op, {})
    names = {**names, "kv_cache_dtype": "kv_dtype"} if case.op == "convert_fp8" else names
    if case.op == "rms_norm":
        names = {"result": "out"}
    defaults = {
        "tp_rank": 0,
        "blocksparse_local_blocks": 0,
        "blocksparse_vert_stride": 0,
        "blocksparse_block_size": 64,
        "blocksparse_head_sliding_step": 0,
        "seq_starts": None,
    }
    positional, keywords = [], {}
    for argument in op._schema.arguments:
        name = names.get(argument.name, argument.name)
        if name in args:
            value = args[name]
        elif argument.has_default_value():
            value = argument.default_value
        else:
            value = defaults[name]
        if argument.kwarg_only:
            keywords[argument.name] = value
        else:
            positional.append(value)
    return tuple(positional), keywords


def separate(case: Case, args: Args) -> Args:
    """opcheck clones each argument by itself: nothing may share memory with another."""
    for name, value in args.items():
        if isinstance(value, torch.Tensor) and not behind(value):
            args[name] = value.detach().clone(memory_format=torch.preserve_format)
    return args


@pytest.mark.parametrize("case", sample(2, cpu_cases()), ids=str)
def test_opcheck(case: Case) -> None:
    _native._load("cpu")
    op = getattr(torch.ops.kvcache_ops, case.op).default
    positional, keywords = schema_arguments(op, case, separate(case, case.args()))
    torch.library.opcheck(op, positional, keywords)


@pytest.mark.parametrize("case", sample(2, cpu_cases()), ids=str)
def test_compile_fullgraph(case: Case) -> None:
    torch._dynamo.reset()
    op = getattr(kvcache_ops, case.op)
    got, expected = case.args(), case.args()
    op(**expected)
    tensors = {k: v for k, v in got.items() if isinstance(v, torch.Tensor)}
    others = {k: v for k, v in got.items() if not isinstance(v, torch.Tensor)}

    def call(tensors: dict[str, torch.Tensor]) -> None:
        op(**tensors, **others)

    torch.compile(call, fullgraph=True, backend="aot_eager")(tensors)
    for name, value in tensors.items():
        assert_same_memory(case, name, value, expected[name])


def test_compiled_layer_of_ops() -> None:
    """Several ops, their results used by ordinary torch, in one graph."""

    def layer(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        kvcache_ops.fused_add_rms_norm(x, residual, weight, 1e-5)
        gate = torch.cat([x * 2, x + 1], dim=-1)
        out = torch.empty_like(x)
        kvcache_ops.silu_and_mul(out, gate)
        return out + residual

    torch._dynamo.reset()
    torch.manual_seed(0)
    x, residual, weight = torch.randn(4, 64), torch.randn(4, 64), torch.randn(64)
    eager = layer(x.clone(), residual.clone(), weight)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, residual, weight), eager)


@pytest.mark.parametrize("name", kvcache_ops.__all__)
def test_schema_marks_what_is_written(name: str) -> None:
    _native._load("cpu")
    schema = getattr(torch.ops.kvcache_ops, name).default._schema
    assert not schema.returns
    # One that marks nothing is dropped from compiled graphs.
    assert any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments)
