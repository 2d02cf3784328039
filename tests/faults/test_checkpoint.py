"""A checkpoint that cannot be used: every rank says what is wrong, soon, and nothing is left.

The ranks are real processes here; tests/unit/tp_llama/test_tp_loader.py has the other cases.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.tp_llama.tiny_checkpoint import write_checkpoint, write_weights

ROOT = Path(__file__).parents[2]
DEADLINE_S = 120
# Loads every directory of its arguments ("a|b": a on rank 0, b on the others); prints the errors.
LOAD = """
import json, sys
from pathlib import Path
from communicators import parallel_state as ps
from scripts.tp_llama.agreement import AgreedError
from scripts.tp_llama.loader import load
ps.init_distributed_environment(device="cpu")
ps.initialize_model_parallel(tensor_model_parallel_size=ps.get_world_group().world_size)
tp, messages = ps.get_tp_group(), []
for argument in sys.argv[1:]:
    choices = argument.split("|")
    try:
        load(Path(choices[min(tp.rank, len(choices) - 1)]), tp)
        messages.append("")
    except AgreedError as error:
        messages.append(str(error))
print(json.dumps(messages))
ps.destroy_distributed_environment()
"""


def start_ranks(world_size: int, *command: str) -> list[subprocess.Popen[str]]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    common = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world_size),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]


def outcome(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        out, errors = process.communicate(timeout=DEADLINE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, out, errors


def truncate(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size * 2 // 3)


@pytest.fixture
def shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm"))


def test_every_rank_names_the_fault(tmp_path: Path, shared_memory: set[str]) -> None:
    sound, missing, truncated, shape, heads = (tmp_path / n for n in ("ok", "m", "t", "s", "h"))
    write_checkpoint(sound)
    tensors = write_checkpoint(missing)
    tensors.pop("model.layers.0.self_attn.v_proj.weight")
    write_weights(missing, tensors)
    write_checkpoint(truncated)
    truncate(truncated / "model.safetensors")
    write_checkpoint(shape, intermediate_size=88)
    write_weights(shape, write_checkpoint(tmp_path / "other"))
    write_checkpoint(heads, num_attention_heads=5, num_key_value_heads=5)

    cases = [missing, truncated, shape, heads, f"{sound}|{truncated}", sound]
    ranks = [outcome(p) for p in start_ranks(2, "-c", LOAD, *map(str, cases))]
    messages = []
    for code, out, errors in ranks:
        assert code == 0, errors
        messages.append(json.loads(out))
    assert messages[0] == messages[1]
    expected = [
        f"{missing}: tensor model.layers.0.self_attn.v_proj.weight is missing",
        f"{truncated / 'model.safetensors'}: truncated: ",
        "model.layers.0.mlp.gate_proj.weight must have shape [88, 64] by config.json; it has [96",
        "tp 2 must divide num_attention_heads, which is 5 in this checkpoint; accepted: 1",
        f"rank 1: {truncated / 'model.safetensors'}: truncated: ",  # one rank alone has the fault
    ]
    for text, message in zip(expected, messages[0], strict=False):
        assert text in message
    assert messages[0][-1] == "", "the ranks are still together after five faults"
    assert set(os.listdir("/dev/shm")) <= shared_memory


def test_the_job_ends_with_one_sentence(tmp_path: Path, shared_memory: set[str]) -> None:
    write_checkpoint(tmp_path)
    truncate(tmp_path / "model.safetensors")
    command = ("-m", "scripts.tp_llama", "--device", "cpu", "--model", str(tmp_path))
    (code_0, out_0, errors_0), (code_1, out_1, errors_1) = (
        outcome(process) for process in start_ranks(2, *command)
    )
    assert (code_0, code_1) == (1, 1)
    assert out_0 == out_1 == ""
    assert errors_0.startswith(f"error: {tmp_path / 'model.safetensors'}: truncated: ")
    assert errors_0.count("\n") == 1
    assert errors_1 == "", "rank 0 speaks for all"
    assert set(os.listdir("/dev/shm")) <= shared_memory
