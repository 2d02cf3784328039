"""Every communicator of the library, and how far each has been seen to work.

The one list of it: `communicators doctor` prints it, README.md holds it as a table, and
tests/unit/test_names.py holds both against the classes.
"""

from __future__ import annotations

from dataclasses import dataclass

#: What was seen of a communicator, strongest first: it ran on the hardware that is named; its logic
#: ran, in the way that is named; it was compiled for what is named, and looked at; nothing.
PROOFS = ("hardware", "simulation", "compiled only", "never run")


@dataclass(frozen=True)
class Entry:
    """One communicator, or several classes that differ by their device alone.

    Attributes:
        classes: names in the package `communicators`.
        moves: by what it moves tensors (or objects).
        serves: which ranks it is for.
        state: (one of PROOFS, what it holds of), strongest first.
    """

    classes: tuple[str, ...]
    moves: str
    serves: str
    state: tuple[tuple[str, str], ...]

    def told(self) -> str:
        """The state in words."""
        return "; ".join(f"{proof}: {of}" for proof, of in self.state)


CATALOG = (
    Entry(
        ("CpuCommunicator",),
        "shared memory, futex, AVX2 or AVX-512 sums",
        "2 to 64 CPU ranks of one host",
        (("hardware", "x86-64"), ("never run", "aarch64")),
    ),
    Entry(
        ("CustomAllreduce",),
        "kernels that push over NVLink",
        "2, 4, 6 or 8 GPUs of one node",
        (
            ("hardware", "2 and 4 x H200"),
            ("simulation", "worlds of 6 and 8 as virtual ranks on one H200"),
            ("compiled only", "gfx942, never executed on AMD"),
        ),
    ),
    Entry(
        ("PyNcclCommunicator",),
        "NCCL through its C interface",
        "GPUs, also across nodes",
        (("hardware", "2 x H200, the watch that ends it when a peer dies included"),),
    ),
    Entry(
        ("QuickAllReduce",),
        "quantized two-shot all-reduce (Q8, Q6, Q4)",
        "2, 4 or 8 GPUs of one node, when the user allows an error",
        (
            ("hardware", "2 x H200"),
            ("simulation", "worlds of 4 and 8 as virtual ranks on one H200"),
            ("compiled only", "gfx942, never executed on AMD"),
        ),
    ),
    Entry(
        ("PyMscclppCommunicator",),
        "Microsoft's `mscclpp` package ([how to get it](docs/mscclpp.md))",
        "2 to 8 GPUs of one node",
        (
            ("hardware", "2 x H200, mscclpp 0.9.0 built without its multicast algorithms"),
            ("simulation", "a stand-in of the package, worlds of 2, 4 and 8"),
        ),
    ),
    Entry(
        ("HpuCommunicator", "NpuCommunicator", "XpuCommunicator"),
        "the vendor's torch.distributed backend",
        "Gaudi, Ascend, Intel GPUs",
        (("simulation", "over gloo under the vendors' names, and on fake devices"),),
    ),
    Entry(
        ("TorchDistributedCommunicator",),
        "torch.distributed (gloo, NCCL)",
        "whatever the others refuse",
        (("hardware", "x86-64, over gloo"),),
    ),
    Entry(
        ("MessageQueue",),
        "a ring in shared memory; ZeroMQ to other hosts",
        "objects, one writer to many readers",
        (("hardware", "x86-64"), ("simulation", "other hosts, as network namespaces")),
    ),
)


def markdown() -> str:
    """The table of README.md."""
    lines = ["| communicator | moves tensors by | for | verified on or by |", "|---|---|---|---|"]
    for entry in CATALOG:
        names = ", ".join(f"`{name}`" for name in entry.classes)
        lines.append(f"| {names} | {entry.moves} | {entry.serves} | {entry.told()} |")
    return "\n".join(lines)
