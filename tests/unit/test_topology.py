"""topology.py and bindings/nvml.py: fake ranks and a fake NVML, no GPU."""

from __future__ import annotations

import dataclasses
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from communicators.base import Refusal
from communicators.bindings import nvml as nvml_binding
from communicators.peer_access import topology
from communicators.peer_access.topology import (
    GpuFacts,
    HostFacts,
    PeerFacts,
    RankFacts,
    Unknown,
    VisibleGpu,
    decide,
    visible_gpus,
)
from communicators.settings import Settings


def uuid(index: int) -> str:
    return f"GPU-{index}{index}{index}{index}ab-0000"


def machine(
    count: int,
    nvlink: Any = lambda a, b: True,
    access: Any = lambda a, b: True,
    name: Any = lambda i: "NVIDIA H200",
) -> list[GpuFacts]:
    """`count` GPUs; nvlink(a, b) and access(a, b) are the driver's claims."""
    return [
        GpuFacts(
            a,
            uuid(a),
            name(a),
            f"0000:{a:02x}:00.0",
            "580.1",
            peers=tuple(
                PeerFacts(uuid(b), 18, nvlink(a, b), access(a, b), access(a, b))
                for b in range(count)
                if b != a
            ),
        )
        for a in range(count)
    ]


def ranks(gpus: list[GpuFacts], host: HostFacts | None = None) -> list[RankFacts]:
    host = host or HostFacts("node0", "boot-0")
    return [RankFacts(rank, host, VisibleGpu(gpu)) for rank, gpu in enumerate(gpus)]


def test_eight_ranks_with_full_nvlink_are_allowed() -> None:
    verdict = decide(ranks(machine(8)))
    assert verdict == topology.Verdict(8, None, None, None, None)
    assert verdict.refusal is None


def test_one_missing_link_names_the_pair_and_the_distance() -> None:
    verdict = decide(ranks(machine(8, nvlink=lambda a, b: {a, b} != {3, 5})))
    assert verdict.nvlink == Refusal("8 GPUs without full NVLink: GPU 3 and 5 are 2 hops apart")
    assert verdict.refusal == verdict.nvlink


def test_hybrid_cube_mesh_counts_further_pairs() -> None:
    # DGX-1: two quads, each fully connected, and one link between counterparts.
    def cube(a: int, b: int) -> bool:
        return a // 4 == b // 4 or abs(a - b) == 4

    verdict = decide(ranks(machine(8, nvlink=cube)))
    assert str(verdict.nvlink) == (
        "8 GPUs without full NVLink: GPU 0 and 5 are 2 hops apart (and 11 more pairs)"
    )


def test_pcie_only_is_allowed_for_two_and_refused_for_four() -> None:
    two, four = (decide(ranks(machine(n, nvlink=lambda a, b: False))) for n in (2, 4))
    assert two.refusal is None and "no NVLink path" in str(two.nvlink)
    assert str(four.refusal) == (
        "4 GPUs without full NVLink: GPU 0 and 1 have no NVLink path between them (and 5 more "
        "pairs)"
    )


def test_a_link_that_only_one_side_claims_does_not_count() -> None:
    verdict = decide(ranks(machine(4, nvlink=lambda a, b: (a, b) != (1, 2))))
    assert str(verdict.nvlink) == "4 GPUs without full NVLink: GPU 1 and 2 are 2 hops apart"


def test_two_hosts_are_named_with_their_ranks() -> None:
    facts = ranks(machine(8))
    facts[6:] = [dataclasses.replace(fact, host=HostFacts("node1", "boot-1")) for fact in facts[6:]]
    verdict = decide(facts)
    assert str(verdict.refusal) == (
        "the ranks are on 2 hosts: node0 has ranks 0, 1, 2, 3, 4, 5; node1 has ranks 6, 7"
    )
    assert verdict.p2p == verdict.nvlink == verdict.host


def test_containers_of_one_kernel_are_one_host() -> None:
    facts = ranks(machine(2))
    facts[1] = dataclasses.replace(facts[1], host=HostFacts("other-container", "boot-0"))
    assert decide(facts).host is None


def test_a_shared_gpu_and_a_mig_instance_are_refused() -> None:
    gpus = machine(2)
    shared = decide(ranks([gpus[0], gpus[1], gpus[0]]))
    assert str(shared.refusal) == (f"rank 0 and 2 are both on GPU 0 (NVIDIA H200, {uuid(0)})")
    facts = ranks(gpus)
    facts[1] = dataclasses.replace(facts[1], device=VisibleGpu(gpus[1], "MIG-1"))
    assert str(decide(facts).refusal) == (
        "rank 1 is on MIG instance MIG-1; MIG instances have no peer access"
    )


def test_an_unknown_gpu_is_an_answer_with_its_reason() -> None:
    facts = ranks(machine(2))
    facts[1] = dataclasses.replace(facts[1], device=Unknown("NVML does not start"))
    verdict = decide(facts)
    assert isinstance(verdict.gpus, Unknown)
    assert str(verdict.refusal) == "the GPU of rank 1 is not known: NVML does not start"


def test_claims_without_proof_are_trusted_for_every_pair_not_only_the_first() -> None:
    gpus = machine(4, access=lambda a, b: (a, b) != (3, 2))
    assert str(decide(ranks(gpus)).refusal) == (
        "GPU 3 cannot read the memory of GPU 2, by the driver's own word"
    )


def test_a_proof_outweighs_a_claim_in_both_directions() -> None:
    pairs = [(uuid(a), uuid(b)) for a in range(2) for b in range(2) if a != b]
    denied = machine(2, access=lambda a, b: False)
    assert decide(ranks(denied), {pair: None for pair in pairs}).refusal is None
    failed = {pairs[0]: None, pairs[1]: Refusal("0 bytes arrived")}
    assert str(decide(ranks(machine(2)), failed).refusal) == (
        "GPU 1 does not reach the memory of GPU 0 in a real copy: 0 bytes arrived"
    )


def test_neither_claim_nor_proof_is_unknown() -> None:
    gpus = [dataclasses.replace(gpu, peers=()) for gpu in machine(2)]
    assert isinstance(decide(ranks(gpus)).p2p, Unknown)
    assert isinstance(decide(ranks(gpus)).nvlink, Unknown)


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, [0, 1, 2]),
        ("2,0", [2, 0]),
        (" 1 , 2", [1, 2]),
        ("0,-1,2", [0]),
        ("0,9,2", [0]),
        ("", []),
        ("1,1", []),
        (uuid(2), [2]),
        (f"{uuid(1)[:9]},0", [1, 0]),
        ("GPU-", []),  # ambiguous
        ("MIG-7", []),
    ],
)
def test_visible_devices(visible: str | None, expected: list[int]) -> None:
    found = visible_gpus(machine(3), visible)
    assert not isinstance(found, Unknown)
    assert [one.gpu.index for one in found] == expected


def test_visible_mig_instances_by_both_names() -> None:
    gpus = machine(2)
    gpus[1] = dataclasses.replace(gpus[1], mig_uuids=("MIG-aa11", "MIG-bb22"))
    assert visible_gpus(gpus, "MIG-bb") == [VisibleGpu(gpus[1], "MIG-bb22")]
    legacy = f"MIG-{uuid(1)}/3/0"
    assert visible_gpus(gpus, legacy) == [VisibleGpu(gpus[1], legacy)]
    assert visible_gpus(gpus, "1") == [VisibleGpu(gpus[1], "MIG-aa11")]


def test_indices_of_mixed_models_need_pci_order() -> None:
    gpus = machine(2, name=lambda i: f"model {i}")
    unknown = visible_gpus(gpus, "0")
    assert isinstance(unknown, Unknown) and "CUDA_DEVICE_ORDER=PCI_BUS_ID" in str(unknown)
    assert visible_gpus(gpus, "0", "PCI_BUS_ID") == [VisibleGpu(gpus[0])]
    assert visible_gpus(gpus, uuid(1)) == [VisibleGpu(gpus[1])]


def test_local_facts_read_the_variables_while_cuda_is_not_started() -> None:
    settings = Settings.from_environment({"CUDA_VISIBLE_DEVICES": uuid(2)})
    facts = topology.local_facts(5, torch.device("cuda:0"), machine(3), settings)
    assert facts.rank == 5 and facts.device == VisibleGpu(machine(3)[2])
    beyond = topology.local_facts(5, torch.device("cuda:1"), machine(3), settings)
    assert str(beyond.device) == "cuda:1 is not among the 1 GPUs that CUDA may use here"
    none = Settings.from_environment({"CUDA_VISIBLE_DEVICES": ""})
    assert isinstance(
        topology.local_facts(0, torch.device("cuda"), machine(3), none).device, Unknown
    )


def test_host_facts_are_stable() -> None:
    assert topology.probe_host() == topology.probe_host()
    assert topology.probe_host().boot_id


class FakeNvmlError(Exception):
    pass


class FakeNvml:
    """pynvml's functions for three GPUs: 0 and 1 directly linked twice, all on one switch."""

    NVMLError = FakeNvmlError
    NVML_NVLINK_MAX_LINKS = 36

    def __init__(self, working: bool = True, switch_links: tuple[int, ...] = (4, 4, 2)) -> None:
        self.working = working
        self.switch_links = switch_links
        self.users = 0

    def nvmlInit(self) -> None:
        if not self.working:
            raise FakeNvmlError("Driver Not Loaded")
        self.users += 1

    def nvmlShutdown(self) -> None:
        self.users -= 1

    def nvmlSystemGetDriverVersion(self) -> bytes:
        return b"580.159.04"

    def nvmlDeviceGetCount(self) -> int:
        return 3

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if index > 2:
            raise FakeNvmlError("Invalid Argument")
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return uuid(handle)

    def nvmlDeviceGetName(self, handle: int) -> bytes:
        return b"NVIDIA H200"

    def nvmlDeviceGetPciInfo(self, handle: int) -> Any:
        return SimpleNamespace(busId=f"00000000:{handle:02X}:00.0")

    def nvmlDeviceGetCudaComputeCapability(self, handle: int) -> tuple[int, int]:
        return (9, 0)

    def nvmlDeviceGetMigMode(self, handle: int) -> list[int]:
        raise FakeNvmlError("Not Supported")

    def nvmlDeviceGetTopologyCommonAncestor(self, a: int, b: int) -> int:
        return 50

    def nvmlDeviceGetP2PStatus(self, a: int, b: int, index: int) -> int:
        assert isinstance(index, int)
        if index == 2:
            return 0 if {a, b} == {0, 1} else 5
        return 0

    def _far_ends(self, handle: int) -> list[tuple[int, str]]:
        direct = [(0, f"00000000:{1 - handle:02X}:00.0")] * 2 if handle < 2 else []
        return direct + [(2, "00000000:FF:00.0")] * self.switch_links[handle]

    def nvmlDeviceGetNvLinkState(self, handle: int, link: int) -> int:
        if link >= 18:
            raise FakeNvmlError("Invalid Argument")
        return int(link < len(self._far_ends(handle)))

    def nvmlDeviceGetNvLinkRemotePciInfo(self, handle: int, link: int) -> Any:
        return SimpleNamespace(busId=self._far_ends(handle)[link][1])

    def nvmlDeviceGetNvLinkRemoteDeviceType(self, handle: int, link: int) -> int:
        return self._far_ends(handle)[link][0]


def test_nvml_facts_count_direct_and_switched_links() -> None:
    fake = FakeNvml()
    gpus = nvml_binding.read_gpus(fake)
    assert not isinstance(gpus, Unknown) and fake.users == 0
    assert (gpus[0].driver, gpus[0].name, gpus[0].capability) == (
        "580.159.04",
        "NVIDIA H200",
        (9, 0),
    )
    to_1, to_2 = gpus[0].peers
    assert to_1 == PeerFacts(uuid(1), 6, True, True, True, "SYS")  # 2 direct, 4 switched
    assert to_2 == PeerFacts(uuid(2), 2, False, True, True, "SYS")  # GPU 2 has only 2
    assert gpus[0].peer(uuid(2)) == to_2 and gpus[0].peer("GPU-none") is None


def test_nvml_absent_or_failing_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = nvml_binding.read_gpus(FakeNvml(working=False))
    assert unknown == Unknown("NVML does not start: Driver Not Loaded")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    unknown = topology.probe_gpus()
    assert isinstance(unknown, Unknown) and "nvidia-ml-py" in str(unknown)


def test_is_full_nvlink_with_nvml_context(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    assert topology.is_full_nvlink([0, 1], 2)
    assert not topology.is_full_nvlink([0, 1, 2], 3)
    assert topology.is_full_nvlink([2], 1)
    assert fake.users == 0
    with pytest.raises(FakeNvmlError):
        topology.is_full_nvlink([0, 7], 2)
    assert fake.users == 0  # shut down after an error too
