"""The catalog is true: it lists the classes that there are, the README and the doctor print it, and
every class and function of the systems that this library replaces exists, with its parameters.

The lists are facts about sglang (srt/distributed/device_communicators, and sgl_kernel.allreduce):
names and parameters in order. A parameter counts as kept when the same name stands at the same
place, and whatever this library adds behind them has a default.
"""

import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import communicators
from communicators import backends
from communicators.base import Communicator
from communicators.catalog import CATALOG, PROOFS, markdown
from communicators.cli.doctor import _communicators

#: file, or file.class -> its functions.
DEVICE_COMMUNICATORS = {
    "cuda_wrapper": """
        find_loaded_library(lib_name)""",
    "cuda_wrapper.CudaRTLibrary": """
        __init__(so_file) | CUDART_CHECK(result) | cudaGetErrorString(error) |
        cudaSetDevice(device) | cudaDeviceSynchronize() | cudaDeviceReset() |
        cudaMalloc(size) | cudaFree(devPtr) | cudaMemset(devPtr, value, count) |
        cudaMemcpy(dst, src, count) | cudaIpcGetMemHandle(devPtr) |
        cudaIpcOpenMemHandle(handle)""",
    "custom_all_reduce.CustomAllreduce": """
        __init__(group, device, max_size) | create_shared_buffer(size_in_bytes, group) |
        free_shared_buffer(pointers, group) | capture() | register_buffer(inp) |
        register_graph_buffers() | should_custom_ar(inp) | all_reduce_reg(inp, out) |
        all_reduce_unreg(inp, out) | all_reduce(inp) | custom_all_reduce(input) | close() |
        __del__()""",
    "custom_all_reduce_utils": """
        update_environment_variables(envs) | producer(batch_src, producer_queue,
        consumer_queue, result_queue, cuda_visible_devices) | consumer(batch_tgt,
        producer_queue, consumer_queue, result_queue, cuda_visible_devices) |
        can_actually_p2p(batch_src, batch_tgt) | gpu_p2p_access_check(src, tgt) |
        with_nvml_context(fn) | is_full_nvlink(physical_device_ids, world_size) |
        is_weak_contiguous(inp)""",
    "hpu_communicator.HpuCommunicator": """
        __init__(group) | all_reduce(x) | all_gather(x, dim)""",
    "npu_communicator.NpuCommunicator": """
        __init__(group) | all_reduce(x) | all_gather(x, dim)""",
    "pymscclpp": """
        mscclpp_is_weak_contiguous(inp) | mscclpp_convert_to_bytes(size_str) |
        mscclpp_bench_time(func, test_niter, warmup_niter)""",
    "pymscclpp.PyMscclppCommunicator": """
        __init__(group, device, max_bytes) | pre_tune_config(dtype) |
        should_mscclpp_allreduce(inp, op) | all_reduce(tensor, op) | change_state(enable)""",
    "pynccl.PyNcclCommunicator": """
        __init__(group, device, library_path) | all_reduce(tensor, op, stream) |
        all_gather(output_tensor, input_tensor, stream, sizes) |
        reduce_scatter(output_tensor, input_tensor, op, stream, sizes) | send(tensor, dst,
        stream) | recv(tensor, src, stream) | broadcast(tensor, src, stream) |
        register_comm_window_raw(ptr, size) | deregister_comm_window(window) | group_start()
        | group_end() | change_state(enable, stream)""",
    "pynccl_allocator": """
        is_symmetric_memory_enabled() | set_graph_pool_id(graph_pool_id) |
        get_nccl_mem_pool()""",
    "pynccl_allocator.use_symmetric_memory": """
        __init__(group_coordinator) | __enter__() | tag(tensor) | __exit__(exc_type,
        exc_val, exc_tb)""",
    "pynccl_wrapper": """
        find_nccl_library()""",
    "pynccl_wrapper.NCCLLibrary": """
        __init__(so_file) | ncclGetErrorString(result) | NCCL_CHECK(result) |
        ncclGetRawVersion() | ncclGetVersion() | ncclGetUniqueId() |
        ncclCommInitRank(world_size, unique_id, rank) | ncclAllReduce(sendbuff, recvbuff,
        count, datatype, op, comm, stream) | ncclReduce(sendbuff, recvbuff, count, datatype,
        op, root, comm, stream) | ncclReduceScatter(sendbuff, recvbuff, count, datatype, op,
        comm, stream) | ncclAllGather(sendbuff, recvbuff, count, datatype, comm, stream) |
        ncclSend(sendbuff, count, datatype, dest, comm, stream) | ncclRecv(recvbuff, count,
        datatype, src, comm, stream) | ncclBroadcast(sendbuff, recvbuff, count, datatype,
        root, comm, stream) | ncclCommDestroy(comm) | ncclCommWindowRegister(comm, buff,
        size, win_flags) | ncclCommWindowDeregister(comm, window) | ncclGroupStart() |
        ncclGroupEnd()""",
    "pynccl_wrapper.ncclDataTypeEnum": """
        from_torch(dtype)""",
    "pynccl_wrapper.ncclRedOpTypeEnum": """
        from_torch(op)""",
    "quick_all_reduce": """
        qr_rocm_arch_available()""",
    "quick_all_reduce.QuickAllReduce": """
        __init__(group, device) | init_quick_all_reduce() | create_shared_buffer() |
        should_quick_allreduce(inp) | quick_all_reduce(inp) | close() | __del__()""",
    "shm_broadcast.MessageQueue": """
        __init__(n_reader, n_local_reader, local_reader_ranks, max_chunk_bytes, max_chunks,
        connect_ip) | export_handle() | create_from_handle(handle, rank) |
        wait_until_ready() | acquire_write() | acquire_read() | enqueue(obj) | dequeue() |
        broadcast_object(obj) | create_from_process_group(pg, max_chunk_bytes, max_chunks,
        writer_rank)""",
    "shm_broadcast.ShmRingBuffer": """
        __init__(n_reader, max_chunk_bytes, max_chunks, name) | __reduce__() | __del__() |
        get_data(current_idx) | get_metadata(current_idx)""",
    "xpu_communicator.XpuCommunicator": """
        __init__(group) | all_reduce(x) | gather(input_, rank_in_group, dst, dim)""",
}

#: sgl_kernel.allreduce on CUDA; those of ROCm are known by name alone.
KERNEL_LIBRARY = """
    init_custom_ar(ipc_tensors, rank_data, rank, full_nvlink) |
    all_reduce(fa, inp, out, reg_buffer, reg_buffer_sz_bytes) | dispose(fa) |
    get_graph_buffer_ipc_meta(fa) | register_buffer(fa, fake_ipc_ptrs) |
    register_graph_buffers(fa, handles, offsets) | meta_size() | mscclpp_generate_unique_id() |
    mscclpp_init_context(unique_id, rank, world_size, scratch, put_buffer, nranks_per_node,
        rank_to_node, rank_to_ib, context_selection) |
    mscclpp_allreduce(context, inp, out, nthreads, nblocks)"""
ROCM_NAMES = [
    "all_reduce_reg",
    "all_reduce_unreg",
    "deterministic_all_reduce_reg",
    "deterministic_all_reduce_unreg",
    "allocate_meta_buffer",
    "get_meta_buffer_ipc_handle",
    "init_custom_qr",
    "qr_get_handle",
    "qr_open_handles",
    "qr_all_reduce",
    "qr_destroy",
    "qr_max_size",
]

HOMES = {
    "cuda_wrapper": "communicators.bindings.cuda_wrapper",
    "custom_all_reduce": "communicators.backends.custom_all_reduce",
    "custom_all_reduce_utils": "communicators.peer_access.p2p",
    "hpu_communicator": "communicators.backends.hpu",
    "npu_communicator": "communicators.backends.npu",
    "pymscclpp": "communicators.backends.mscclpp.pymscclpp",
    "pynccl": "communicators.backends.nccl.pynccl",
    "pynccl_allocator": "communicators.bindings.pynccl_allocator",
    "pynccl_wrapper": "communicators.bindings.pynccl_wrapper",
    "quick_all_reduce": "communicators.backends.quick.quick_all_reduce",
    "shm_broadcast": "communicators.shm_broadcast",
    "xpu_communicator": "communicators.backends.xpu",
}
#: Where a name stands that is not in the home of its file.
MOVED = {
    "custom_all_reduce_utils.with_nvml_context": "communicators.bindings.nvml",
    "custom_all_reduce_utils.is_full_nvlink": "communicators.bindings.nvml",
}
#: What is not here under its name, and what does its work.
REPLACED = {
    # sglang's is in place; all_reduce is vLLM's, of a new tensor (docs/engines.md).
    "pynccl.PyNcclCommunicator.all_reduce": (
        "communicators.backends.nccl.pynccl",
        "PyNcclCommunicator.all_reduce_",
    ),
    "shm_broadcast.ShmRingBuffer.__del__": ("communicators.shm_broadcast", "ShmRingBuffer.close"),
}


def parsed(text):
    for item in text.split("|"):
        name, parameters = re.fullmatch(r"\s*(\w+)\((.*)\)\s*", item, re.DOTALL).groups()
        yield name, [word.strip() for word in parameters.split(",") if word.strip()]


def listed():
    """(key, module, class or "", name, parameters or None) of every function."""
    for place, text in DEVICE_COMMUNICATORS.items():
        file, _, holder = place.partition(".")
        for name, parameters in parsed(text):
            key = f"{place}.{name}"
            yield key, MOVED.get(key, HOMES[file]), holder, name, parameters
    for name, parameters in parsed(KERNEL_LIBRARY):
        yield f"allreduce.{name}", "communicators.allreduce", "", name, parameters
    for name in ROCM_NAMES:
        yield f"allreduce.{name}", "communicators.allreduce", "", name, None


def problem(home, holder, name, parameters):
    """What is missing of a function, or None."""
    found, static = importlib.import_module(home), None
    for part in filter(None, (holder, name)):
        if not hasattr(found, part):
            return f"{home} has no {holder and holder + '.'}{name}"
        static, found = inspect.getattr_static(found, part), getattr(found, part)
    if parameters is None:
        return None
    ours = list(inspect.signature(found).parameters.values())
    if holder and not isinstance(static, staticmethod | classmethod):
        ours = ours[1:]  # self
    names = [p.name for p in ours]
    fixed = [p.name for p in ours if p.kind is not p.VAR_POSITIONAL]
    if len(fixed) < len(ours):  # a *rest takes what two platforms pass there
        parameters = parameters[: names.index(next(n for n in names if n not in fixed))]
    if names[: len(parameters)] != parameters:
        return f"{home}.{holder and holder + '.'}{name} takes {names}, not {parameters}"
    needed = [
        p.name
        for p in ours[len(parameters) :]
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    return f"{home}.{holder and holder + '.'}{name} also needs {needed}" if needed else None


FUNCTIONS = {key: where for key, *where in listed()}
#: Classes of the lists above that are communicators: what a job is told to use.
LISTED = {
    "CustomAllreduce", "HpuCommunicator", "NpuCommunicator", "PyMscclppCommunicator",
    "PyNcclCommunicator", "QuickAllReduce", "MessageQueue", "XpuCommunicator",
}  # fmt: skip
#: Communicators that those systems have elsewhere, or not as a class.
OURS = {"CpuCommunicator", "TorchDistributedCommunicator"}


def test_the_catalog_lists_the_communicators_that_there_are():
    catalogued = [name for entry in CATALOG for name in entry.classes]
    assert len(set(catalogued)) == len(catalogued)
    assert set(catalogued) == LISTED | OURS
    holders = {place.partition(".")[2] for place in DEVICE_COMMUNICATORS}
    assert {name for name in LISTED if name in holders} == LISTED
    for module in pkgutil.walk_packages(backends.__path__, f"{backends.__name__}."):
        importlib.import_module(module.name)
    concrete, classes = set(), [Communicator]
    for kind in classes:
        classes += kind.__subclasses__()
        if kind.__module__.startswith("communicators.") and not inspect.isabstract(kind):
            concrete.add(kind)
    assert {kind.__name__ for kind in concrete} | {"MessageQueue"} == set(catalogued)
    for name in catalogued:
        assert inspect.isclass(getattr(communicators, name))
    for entry in CATALOG:
        proofs = [proof for proof, of in entry.state if of]
        assert proofs and proofs == sorted(set(proofs), key=PROOFS.index)


def test_the_readme_and_the_doctor_print_the_catalog():
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    table = markdown()
    assert table in readme, f"README.md must hold this table:\n{table}"
    printed = {finding.name: finding.text for finding in _communicators()}
    assert printed == {name: entry.told() for entry in CATALOG for name in entry.classes}


def test_the_lists_are_whole():
    assert sum(key.split(".")[0] in HOMES for key in FUNCTIONS) == 115
    assert len(FUNCTIONS) == 115 + 10 + 12
    assert set(REPLACED) | set(MOVED) <= set(FUNCTIONS)


@pytest.mark.parametrize("key", FUNCTIONS)
def test_it_exists_with_its_parameters(key):
    home, holder, name, parameters = FUNCTIONS[key]
    if key in REPLACED:
        assert problem(home, holder, name, parameters), "it exists: strike it from REPLACED"
        home, instead = REPLACED[key]
        holder, name, parameters = *instead.split("."), None
    assert (found := problem(home, holder, name, parameters)) is None, found


def test_a_wrong_name_or_parameter_is_found():
    home = "communicators.backends.xpu"
    assert problem(home, "XpuCommunicator", "gather", ["input_", "rank_in_group"]) is None
    assert "also needs ['rank_in_group']" in problem(home, "XpuCommunicator", "gather", ["input_"])
    assert "not ['x']" in problem(home, "XpuCommunicator", "gather", ["x"])
    assert "has no XpuCommunicator.scatter" in problem(home, "XpuCommunicator", "scatter", [])
