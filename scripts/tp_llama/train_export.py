"""Write a trained DenseLlama as a Hugging Face directory that any Llama loader reads."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from .train_model import DenseLlama, Shape

BOS, EOS = 256, 257


def byte_characters() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary.

    The GPT-2 table: printable Latin-1 bytes stand for themselves, the others move up from U+0100.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in printable]
    return [chr(b) if b in printable else chr(256 + moved.index(b)) for b in range(256)]


def tokenizer_json() -> dict[str, object]:
    """A `tokenizers` file: 256 bytes with token id = byte, no merges, bos before every text."""
    special = [
        {
            "id": token,
            "content": content,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for token, content in ((BOS, "<|bos|>"), (EOS, "<|eos|>"))
    ]
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    bos = {"SpecialToken": {"id": "<|bos|>", "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, first],
            "pair": [bos, first, second],
            "special_tokens": {
                "<|bos|>": {"id": "<|bos|>", "ids": [BOS], "tokens": ["<|bos|>"]},
            },
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {char: byte for byte, char in enumerate(byte_characters())},
            "merges": [],
        },
    }


def config_json(shape: Shape) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.context,
        "rope_theta": shape.rope_theta,
        "rope_scaling": None,
        "rms_norm_eps": shape.norm_eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def export(model: DenseLlama, shape: Shape, directory: Path) -> None:
    """Write config.json, tokenizer.json and model.safetensors (bf16) to ``directory``."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", config_json(shape))
    write_json(directory / "tokenizer.json", tokenizer_json())
    weights = {
        name: weight.detach().to(torch.bfloat16).contiguous()
        for name, weight in model.state_dict().items()
    }
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
