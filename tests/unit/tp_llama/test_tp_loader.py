"""Every rank reads its own slices and nothing else; together the slices are the whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from scripts.tp_llama import checkpoint_files
from scripts.tp_llama.agreement import AgreedError, together
from scripts.tp_llama.checkpoint_files import CheckpointFiles, as_dtype
from scripts.tp_llama.errors import CheckpointError
from scripts.tp_llama.loader import LlamaWeights, load
from scripts.tp_llama.partition import Partition
from tests.unit.tp_llama.thread_ranks import ThreadGroup, on_ranks
from tests.unit.tp_llama.tiny_checkpoint import TINY, write_checkpoint, write_weights

CPU = torch.device("cpu")
BIASED: dict[str, Any] = {"attention_bias": True, "mlp_bias": True}


def load_all(directory: Path, tp: int) -> list[tuple[Partition, LlamaWeights]]:
    return [result[1:] for result in on_ranks(tp, lambda group: load(directory, group))]


def rows_of(parts: list[tuple[Partition, LlamaWeights]], kind: str) -> dict[str, Tensor]:
    """The whole tensors of layer 1, put together again from the stacked parts of the ranks."""
    layers = [weights.layers[1] for _, weights in parts]
    dim, replicas = TINY["head_dim"], max(1, len(parts) // TINY["num_key_value_heads"])
    suffix = "" if kind == "weight" else "_bias"
    q, k, v = list[Tensor](), list[Tensor](), list[Tensor]()
    for (part, _), layer in zip(parts, layers, strict=True):
        sizes = (part.heads * dim, part.kv_heads * dim, part.kv_heads * dim)
        for into, piece in zip((q, k, v), getattr(layer, f"qkv{suffix}").split(sizes), strict=True):
            into.append(piece)
    halves = [getattr(layer, f"gate_up{suffix}").chunk(2) for layer in layers]
    for copies in (k, v):
        for first in range(0, len(copies), replicas):
            assert all(torch.equal(c, copies[first]) for c in copies[first : first + replicas])
    return {
        "self_attn.q_proj": torch.cat(q),
        "self_attn.k_proj": torch.cat(k[::replicas]),
        "self_attn.v_proj": torch.cat(v[::replicas]),
        "mlp.gate_proj": torch.cat([gate for gate, _ in halves]),
        "mlp.up_proj": torch.cat([up for _, up in halves]),
    }


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_the_parts_make_the_whole(tmp_path: Path, tp: int, files: int) -> None:
    whole = write_checkpoint(tmp_path, files, **BIASED)
    parts = load_all(tmp_path, tp)
    prefix = "model.layers.1."
    for kind in ("weight", "bias"):
        for name, tensor in rows_of(parts, kind).items():
            assert torch.equal(tensor, whole[f"{prefix}{name}.{kind}"].float()), name
    layers = [weights.layers[1] for _, weights in parts]
    for field, name in (("output", "self_attn.o_proj"), ("down", "mlp.down_proj")):
        columns = torch.cat([getattr(layer, field) for layer in layers], dim=1)
        assert torch.equal(columns, whole[f"{prefix}{name}.weight"].float()), name
        for layer in layers:
            bias = getattr(layer, f"{field}_bias")
            assert torch.equal(bias, whole[f"{prefix}{name}.bias"].float()), name
    for field, name in (("embedding", "model.embed_tokens"), ("head", "lm_head")):
        rows = torch.cat([getattr(weights, field) for _, weights in parts])
        size = TINY["vocab_size"]
        assert torch.equal(rows[:size], whole[f"{name}.weight"].float()), name
        assert not rows[size:].any(), "the padding must be zeros"
    for _, weights in parts:
        assert torch.equal(weights.norm, whole["model.norm.weight"].float())
        expected = whole[f"{prefix}post_attention_layernorm.weight"].float()
        assert torch.equal(weights.layers[1].post_attention_norm, expected)


def test_dtype_and_tied_embeddings(tmp_path: Path) -> None:
    whole = write_checkpoint(tmp_path, dtype=torch.float32, tie_word_embeddings=True)
    _, _, weights = on_ranks(1, lambda group: load(tmp_path, group, torch.bfloat16))[0]
    assert weights.head is weights.embedding
    assert torch.equal(weights.embedding, whole["model.embed_tokens.weight"].bfloat16())
    assert weights.layers[0].qkv.dtype == torch.bfloat16


@pytest.fixture
def elements_read(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Tensor name -> elements that were asked of the file, all ranks of a call together."""
    counts: dict[str, int] = {}

    class Slice:
        def __init__(self, name: str, inner: Any) -> None:
            self.name, self.inner = name, inner

        def __getattr__(self, attribute: str) -> Any:
            return getattr(self.inner, attribute)

        def __getitem__(self, index: Any) -> Tensor:
            piece: Tensor = self.inner[index]
            counts[self.name] = counts.get(self.name, 0) + piece.numel()
            return piece

    class File:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.inner = safe_open(*args, **kwargs)

        def __enter__(self) -> File:
            self.inner.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self.inner.__exit__(*error)

        def keys(self) -> list[str]:
            return list(self.inner.keys())

        def get_slice(self, name: str) -> Slice:
            return Slice(name, self.inner.get_slice(name))

        # get_tensor is left out: whoever reads a whole tensor fails here.

    monkeypatch.setattr(checkpoint_files, "safe_open", File)
    yield counts


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_each_element_is_read_by_one_rank(
    tmp_path: Path, elements_read: dict[str, int], tp: int
) -> None:
    whole = write_checkpoint(tmp_path, **BIASED)
    load_all(tmp_path, tp)
    assert set(elements_read) == set(whole)
    for name, count in elements_read.items():
        # Norms, and biases that are added after the sum, are on every rank.
        everywhere = "norm" in name or name.endswith(("o_proj.bias", "down_proj.bias"))
        assert count == whole[name].numel() * (tp if everywhere else 1), name


def mapped_bytes_in_memory(path: Path) -> int:
    """Bytes of the file's mappings that this process has touched (Rss)."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0] and not line.split(" ")[0].endswith(":"):
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def test_pages_of_other_ranks_are_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    rows = 8192
    save_file({"w": torch.zeros(rows, 1024)}, path)  # 32 MiB
    with CheckpointFiles(tmp_path) as files:
        piece = as_dtype(files.read("w", slice(rows // 4, rows // 2)), torch.float32, CPU)
        touched = mapped_bytes_in_memory(path)
    # A quarter; the kernel maps up to 2 MiB around a fault, here at both ends.
    assert 8 << 20 <= touched <= 12 << 20
    assert piece.nbytes == 8 << 20
    assert mapped_bytes_in_memory(path) == 0, "what was read must not keep the file mapped"


def message_of(directory: Path, tp: int = 2) -> str:
    """What every rank raises; they must all say the same."""

    def work(group: ThreadGroup) -> str:
        with pytest.raises(AgreedError) as caught:
            load(directory, group)
        return str(caught.value)

    messages = on_ranks(tp, work)
    assert len(set(messages)) == 1
    return messages[0]


@pytest.mark.parametrize("files", [1, 2])
def test_a_missing_tensor_is_named(tmp_path: Path, files: int) -> None:
    tensors = write_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    del tensors["model.layers.1.mlp.up_proj.weight"]
    write_weights(tmp_path, tensors, files)
    assert "tensor model.layers.1.mlp.up_proj.weight is missing" in message_of(tmp_path)


def test_a_wrong_shape_is_named_with_both_shapes(tmp_path: Path) -> None:
    tensors = write_checkpoint(tmp_path)
    tensors["model.norm.weight"] = torch.ones(65, dtype=torch.bfloat16)
    write_weights(tmp_path, tensors)
    message = message_of(tmp_path)
    assert "model.safetensors: tensor model.norm.weight must have shape [64]" in message
    assert "it has [65]" in message


def test_a_quantized_tensor_is_refused(tmp_path: Path) -> None:
    tensors = write_checkpoint(tmp_path)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)
    write_weights(tmp_path, tensors)
    message = message_of(tmp_path)
    assert "lm_head.weight has dtype F8_E4M3; accepted: BF16, F16, F32" in message


def test_many_problems_are_counted(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    write_weights(tmp_path, {"model.norm.weight": torch.ones(64)})
    message = message_of(tmp_path)
    assert "tensor model.embed_tokens.weight is missing" in message
    assert message.endswith("; and 17 problems more")  # of 1 + 2 * 9 + 1 tensors


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, 0.999])
def test_a_truncated_file_is_named(tmp_path: Path, kept: float) -> None:
    write_checkpoint(tmp_path)
    path = tmp_path / "model.safetensors"
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(int(kept if kept > 1 or kept == 0 else kept * size))
    message = message_of(tmp_path)
    assert message.startswith(f"{path}: truncated")
    if 0 < kept < 1:
        assert f"bytes of {size} are there; tensor " in message


def test_the_first_tensor_that_is_cut_off_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(64), "b": torch.zeros(64)}, tmp_path / "model.safetensors")
    path = tmp_path / "model.safetensors"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 4)
    with pytest.raises(CheckpointError, match="tensor b is the first of 1 that are cut off"):
        CheckpointFiles(tmp_path).__enter__()


def test_a_shard_that_is_missing_or_broken_is_named_once(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, files=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    (tmp_path / "model-00003-of-00003.safetensors").write_bytes(b"\x08" + bytes(7) + b"not json")
    message = message_of(tmp_path)
    assert message.count("model-00002-of-00003.safetensors: the file is missing") == 1
    assert message.count("model-00003-of-00003.safetensors: not a safetensors file") == 1


def test_an_index_that_points_to_the_wrong_file(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, files=2)
    index = tmp_path / "model.safetensors.index.json"
    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    text = index.read_text()
    assert f'"model.norm.weight": "{second}"' in text
    text = text.replace(f'"model.norm.weight": "{second}"', f'"model.norm.weight": "{first}"')
    index.write_text(text)
    message = message_of(tmp_path)
    assert f"{first}: tensor model.norm.weight is missing; the index says" in message
    name = "model.norm.weight"
    maps = [
        f'{{"weight_map": {{"{name}": {file}}}}}' for file in ("5", "null", '""', '"../x"', "[]")
    ]
    for wrong in (
        "{}",
        "[]",
        "null",
        '{"weight_map": []}',
        '{"weight_map": 3}',
        "[" * 10**5,
        *maps,
    ):
        index.write_text(wrong)
        assert "model.safetensors.index.json: an object with a weight_map" in message_of(tmp_path)


@pytest.mark.parametrize("header", [b"[]", b"3", b'{"a": 5}', b'{"a": {"data_offsets": []}}', b"{"])
def test_a_header_that_is_no_table_of_tensors(tmp_path: Path, header: bytes) -> None:
    write_checkpoint(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(len(header).to_bytes(8, "little") + header)
    assert message_of(tmp_path).startswith(f"{weights}: not a ")


def test_a_directory_without_weights(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert "holds neither model.safetensors nor model.safetensors.index.json" in message_of(
        tmp_path
    )


def test_a_tp_that_does_not_divide_the_heads(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    assert message_of(tmp_path, 3) == (
        "tp 3 must divide num_attention_heads, which is 8 in this checkpoint; accepted: 1, 2, 4, 8"
    )


def test_one_rank_that_fails_stops_all_of_them() -> None:
    def work(group: ThreadGroup) -> str:
        def step() -> int:
            if group.rank_in_group == 1:
                raise MemoryError("no room")
            return 3

        with pytest.raises(AgreedError) as caught:
            together(group, step)
        return str(caught.value)

    assert set(on_ranks(3, work)) == {"rank 1: MemoryError: no room"}


def test_an_error_of_the_program_is_not_taken_for_one_of_the_input() -> None:
    def step() -> None:
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        on_ranks(1, lambda group: together(group, step))
