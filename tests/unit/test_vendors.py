"""HPU, NPU and XPU: their logic over gloo under the vendors' names, and on fake devices."""

import datetime
import sys
import types
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from communicators import Capability, Group, RefusedError, Settings
from communicators.backends.hpu import HpuCommunicator
from communicators.backends.npu import NpuCommunicator
from communicators.backends.xpu import XpuCommunicator
from communicators.errors import CommMismatchError, InvalidArgumentError
from communicators.selection.dispatcher import Dispatcher
from communicators.selection.opening import candidates
from tests.ranks import Rank, pool
from tests.threads import run_ranks

BACKENDS = {HpuCommunicator: "hccl", NpuCommunicator: "hccl", XpuCommunicator: "gloo"}
VENDORS = pytest.mark.parametrize("vendor", list(BACKENDS), ids=lambda v: v.name)
WORLDS = pytest.mark.parametrize("world_size", [1, 2, 3, 4])
TIMEOUT = datetime.timedelta(seconds=60)
SHAPES = [(5,), (2, 3), (4, 1, 3), (2, 3, 4, 2), (0, 3), ()]


def run(world_size, function, *arguments, backend="gloo"):
    """function(process_group, *arguments) on each rank; the results in rank order."""
    return pool(world_size, "vendors").run(in_process_group, function, backend, *arguments)


def in_process_group(rank: Rank, function, backend, *arguments):
    if "groups" not in rank.cache:
        # Registered over gloo; torch lets nobody else be called "xccl".
        dist.Backend.register_backend("hccl", gloo, devices=["cpu"])
        dist.init_process_group(
            "gloo", store=rank.store(), rank=rank.rank, world_size=rank.world_size, timeout=TIMEOUT
        )
        rank.cache["groups"] = {
            name: dist.new_group(timeout=TIMEOUT, backend=name) for name in ("gloo", "hccl")
        }
    return function(rank.cache["groups"][backend], *arguments)


def gloo(store, rank, size, timeout):
    return dist.ProcessGroupGloo(store, rank, size, timeout=timeout)


def fake_bridge():
    """A habana_frameworks.torch that has a device and counts mark_step."""
    names = ("", ".torch", ".torch.hpu", ".torch.distributed", ".torch.distributed.hccl")
    modules = {f"habana_frameworks{n}": types.ModuleType(f"habana_frameworks{n}") for n in names}
    bridge: Any = modules["habana_frameworks.torch"]
    bridge.steps = 0

    def mark_step():
        bridge.steps += 1

    bridge.core = types.SimpleNamespace(mark_step=mark_step)
    hpu: Any = modules["habana_frameworks.torch.hpu"]
    hpu.is_available = lambda: True
    sys.modules.update(modules)
    return bridge


def opened(vendor, group, **options):
    """A live one on CPU tensors: the bridge of HPU is faked, the other probes are replaced."""
    if vendor is HpuCommunicator:
        fake_bridge()
    else:
        vendor = type(vendor.__name__, (vendor,), {"missing": lambda self: None})
    communicator = vendor(group, torch.device("cpu"), **options)
    assert communicator.refusal is None, communicator.refusal
    return communicator


def tensor(rank, shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(17 + rank)
    return torch.randint(-9, 9, shape, generator=generator).to(dtype)


def exact(actual, expected):
    assert actual.is_contiguous()
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def every_shape_and_dim(group, vendor):
    communicator = opened(vendor, group)
    rank, world_size = group.rank(), group.size()
    for shape in SHAPES:
        all_of = [tensor(r, shape) for r in range(world_size)]
        x = all_of[rank].clone()
        total = torch.stack(all_of).sum(0)
        out = communicator.all_reduce(x)
        exact(out, total)
        assert out is not x and (not x.numel() or out.data_ptr() != x.data_ptr())
        for src in range(world_size):
            y = x.clone()
            assert communicator.broadcast(y, src) is y
            exact(y, all_of[src])
        for dim in range(-max(x.dim(), 1), max(x.dim(), 1)):
            joined = torch.cat(all_of, dim) if shape else torch.stack(all_of)
            exact(communicator.all_gather(x, dim), joined)
            if vendor is XpuCommunicator:
                for dst in range(world_size):
                    gathered = communicator.gather(x, rank, dst, dim)
                    if rank == dst:
                        exact(gathered, joined)
                    else:
                        assert gathered is None
            if shape and shape[dim] % world_size == 0:
                scattered = communicator.reduce_scatter(x, dim)
                exact(scattered, total.tensor_split(world_size, dim)[rank].contiguous())
            elif world_size > 1:
                with pytest.raises(InvalidArgumentError, match="is not a multiple of the"):
                    communicator.reduce_scatter(x, dim)
        exact(x, all_of[rank])  # no input was written


@WORLDS
@VENDORS
def test_every_verb_shape_and_dim(vendor, world_size):
    run(world_size, every_shape_and_dim, vendor, backend=BACKENDS[vendor])


def default_dim_and_strides(group, vendor):
    communicator = opened(vendor, group)
    rank, world_size = group.rank(), group.size()
    wide = [tensor(r, (4, 6)) for r in range(world_size)]
    x = wide[rank].t()  # not contiguous
    exact(communicator.all_gather(x), torch.cat([w.t() for w in wide], -1))
    exact(communicator.all_reduce(x), torch.stack(wide).sum(0).t().contiguous())
    exact(communicator.reduce_scatter(x), torch.stack(wide).sum(0).t().chunk(2, -1)[rank].clone())
    assert communicator.broadcast(x, 1) is x
    exact(x.contiguous(), wide[1].t().contiguous())
    if vendor is XpuCommunicator:
        communicator.gather(x, rank)


@VENDORS
def test_the_default_dim_is_the_last_and_strides_do_not_matter(vendor):
    run(2, default_dim_and_strides, vendor, backend=BACKENDS[vendor])


def dispatched(group, vendor):
    """The dispatcher holds the vendor first and torch.distributed's own after it."""
    host = Group.of(group)
    communicator = opened(vendor, host)
    dispatcher = Dispatcher(host, torch.device("cpu"), [communicator])
    rank, world_size = group.rank(), group.size()
    x = torch.full((3,), float(rank + 1))
    out = torch.empty(world_size * 3) if rank == 1 else None
    dispatcher.run("gather", out, x, 1)
    if rank == 1:
        exact(out, torch.arange(1.0, world_size + 1).repeat_interleave(3))
    dispatcher.run("all_reduce", x, x)
    exact(x, torch.full((3,), sum(range(world_size + 1)) * 1.0))
    if rank == 0:
        dispatcher.run("send", None, x, 1)
    elif rank == 1:
        y = torch.empty(3)
        dispatcher.run("recv", y, None, 0)
        exact(y, x)
    return dispatcher.explain()


@VENDORS
def test_a_dispatcher_runs_it(vendor):
    for text in run(3, dispatched, vendor, backend=BACKENDS[vendor]):
        assert f"any size: {vendor.name}" in text


def marks(group):
    communicator = opened(HpuCommunicator, group)
    bridge, x = sys.modules["habana_frameworks.torch"], torch.ones(2, 2)
    counts = []
    for call in (
        lambda: communicator.all_reduce(x),
        lambda: communicator.all_gather(x),
        lambda: communicator.reduce_scatter(x),
        lambda: communicator.broadcast(x),
        lambda: communicator.all_reduce(x[:0]),  # nothing moves: no step either
    ):
        before = bridge.steps
        call()
        counts.append(bridge.steps - before)
    order = []
    bridge.core.mark_step = lambda: order.append("step")
    original, dist.all_reduce = dist.all_reduce, lambda *a, **k: order.append("collective")
    try:
        communicator.all_reduce(x)
    finally:
        dist.all_reduce = original
    return counts, order


def test_hpu_marks_the_step_before_each_collective():
    for counts, order in run(2, marks, backend="hccl"):
        assert counts == [1, 1, 1, 1, 0]
        assert order == ["step", "collective"]


def quantized(group, shape, dtype):
    communicator = opened(NpuCommunicator, group)
    rank, world_size = group.rank(), group.size()
    all_of = []
    for r in range(world_size):
        generator = torch.Generator().manual_seed(r)
        values = torch.randn(shape, generator=generator) * torch.logspace(-3, 2, shape[-1])
        all_of.append(values.to(dtype))
    x = all_of[rank]
    out = communicator.quant_all_reduce(x)
    assert out.dtype == dtype and out.shape == x.shape
    wide = torch.stack(all_of).double()
    total = wide.sum(0)
    absmax = wide.abs().amax(-1, keepdim=True).sum(0)
    bound = 1.01 * (absmax + total.abs().amax(-1, keepdim=True)) / 254
    bound = bound + total.abs() * torch.finfo(dtype).eps
    error = (out.double() - total).abs()
    assert (error <= bound).all(), (error / bound).max()
    poisoned = x.clone()
    if rank == world_size - 1:
        poisoned.view(-1, shape[-1])[0, 0] = torch.inf
    clean = communicator.quant_all_reduce(poisoned).view(-1, shape[-1])
    assert clean[0].isnan().all()
    assert torch.equal(clean[1:], out.view(-1, shape[-1])[1:])
    assert not communicator.quant_all_reduce(torch.zeros_like(x)).any()
    assert communicator.quant_all_reduce(x[:0]).shape == x[:0].shape
    with pytest.raises(InvalidArgumentError, match="float16, bfloat16 and float32 are accepted"):
        communicator.quant_all_reduce(x.to(torch.int8))
    return out.view(torch.int8 if dtype is torch.float32 else torch.int16).tolist(), float(
        (error / bound).max()
    )


@WORLDS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(7, 64), (2, 3, 32)])
def test_npu_int8_all_reduce_keeps_its_bound_and_ranks_agree(world_size, dtype, shape):
    results = run(world_size, quantized, shape, dtype, backend="hccl")
    assert all(bits == results[0][0] for bits, _ in results)
    assert max(share for _, share in results) > 0.1  # the bound is of the size of the error


def mismatch(group):
    communicator = opened(XpuCommunicator, group, settings=Settings(timeout_s=20, debug=True))
    rank = group.rank()
    with pytest.raises(CommMismatchError, match=rf"all_gather: rank {rank} passes"):
        communicator.all_gather(torch.zeros(2 + rank))
    with pytest.raises(InvalidArgumentError, match="this is rank"):
        communicator.gather(torch.zeros(2), rank + 1)
    with pytest.raises(InvalidArgumentError, match=r"has dims -1\.\.0"):
        communicator.all_gather(torch.zeros(2), 1)
    with pytest.raises(InvalidArgumentError, match=r"broadcast\(src=2\)"):
        communicator.broadcast(torch.zeros(2), 2)


def test_uneven_ranks_are_named_in_debug_and_bad_arguments_always():
    run(2, mismatch)


@pytest.mark.parametrize(
    ("vendor", "reason"),
    [
        (HpuCommunicator, "Intel Gaudi's PyTorch bridge cannot be imported"),
        (NpuCommunicator, "Huawei Ascend's torch_npu cannot be imported"),
        (XpuCommunicator, "torch.xpu finds no Intel GPU"),
    ],
)
def test_off_the_platform_it_refuses_and_says_what_is_missing(vendor, reason):
    for communicator in run_ranks(2, vendor):
        assert reason in str(communicator.refusal)
        assert communicator.disabled
        with pytest.raises(RefusedError, match=r"is not in use on rank \d: .*"):
            communicator.all_reduce(torch.zeros(2))
        with pytest.raises(RefusedError):
            communicator.all_gather(torch.zeros(2))


def test_one_rank_off_the_platform_refuses_on_all():
    class Half(XpuCommunicator):
        def capability(self):
            if self.group.rank == 1:
                return super().capability()
            return Capability(frozenset({"all_reduce"}))

    for communicator in run_ranks(2, lambda group: Half(group, torch.device("cpu"))):
        assert str(communicator.refusal).startswith("rank 1: torch.xpu finds no Intel GPU")


class Alone(Group):
    """Rank 1 of 4 whose peers agree with everything: for shapes and devices without data."""

    def __init__(self, process_group):
        super().__init__(dist.HashStore(), 1, 4, process_group=process_group, settings=Settings())

    def gather_objects(self, tag, value, timeout_s=None):
        return [value] * self.world_size


def fake_devices():
    """In a process of its own, with privateuseone renamed as torch_npu does it."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    class Module(types.ModuleType):
        is_available = staticmethod(lambda: True)

    torch.utils.rename_privateuse1_backend("npu")
    torch._register_device_module("npu", Module("torch.npu"))
    served = ",".join(f"{device}:fake" for device in ("cpu", "hpu", "npu", "xpu"))
    dist.init_process_group(served, store=FakeStore(), rank=1, world_size=4)
    sys.modules["torch_npu"] = types.ModuleType("torch_npu")
    fake_bridge()
    replaced: Any = type("Xpu", (XpuCommunicator,), {"missing": lambda self: None})
    for vendor in (HpuCommunicator, NpuCommunicator, replaced):
        communicator = vendor(Alone(dist.group.WORLD))
        assert communicator.refusal is None, communicator.refusal
        device = torch.device(f"{vendor.name}:0")
        assert communicator.device.type == vendor.name
        with FakeTensorMode():
            x = torch.empty(4, 6, 8, device=device, dtype=torch.bfloat16)
            results = [communicator.all_reduce(x), communicator.broadcast(x, 3)]
            assert all(list(y.shape) == [4, 6, 8] for y in results)
            for dim, shape in ((-1, [4, 6, 32]), (-2, [4, 24, 8]), (0, [16, 6, 8])):
                results.append(communicator.all_gather(x, dim))
                assert list(results[-1].shape) == shape
            for dim, shape in ((-1, [4, 6, 2]), (0, [1, 6, 8])):
                results.append(communicator.reduce_scatter(x, dim))
                assert list(results[-1].shape) == shape
            if vendor is replaced:
                assert communicator.gather(x, 1, dst=0) is None
                results.append(communicator.gather(x, 1, dst=1))
                assert list(results[-1].shape) == [4, 6, 32]
            if vendor is NpuCommunicator:
                results.append(communicator.quant_all_reduce(x))
                assert list(results[-1].shape) == [4, 6, 8]
            assert all(y.device == device and y.dtype == x.dtype for y in results)
    dist.destroy_process_group()


def test_no_step_leaves_the_device_of_the_input():
    import subprocess

    code = "from tests.unit.test_vendors import fake_devices; fake_devices()"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_candidates_bind_the_devices_process_group():
    for device_type, vendor in (("hpu", HpuCommunicator), ("xpu", XpuCommunicator)):
        construct: Any
        (construct,) = candidates(device_type, "the group")
        assert construct.func is vendor
        assert construct.keywords == {"process_group": "the group"}
    (construct,) = candidates("npu", None)
    assert construct.func is NpuCommunicator
