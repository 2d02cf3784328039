"""What a message may hold: tensors send what they show, and bad objects harm no other message."""

import pickle
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from communicators.errors import CommTimeoutError, CommunicatorError, InvalidArgumentError
from communicators.message_queue.codec import Encoder
from communicators.shm_broadcast import MessageQueue
from tests.unit.queue_processes import SETTINGS, both_ends, either_end

__all__ = ["either_end"]  # pytest finds fixtures by their names here

N = 1 << 20


class Marked(torch.Tensor):
    """A subclass without a way of its own to be pickled."""


class WithSlots(torch.Tensor):
    __slots__ = ("note",)


class Itself(torch.Tensor):
    def __reduce_ex__(self, protocol: Any) -> Any:
        return torch.full, ((2,), 5.0)


def _with_attribute() -> torch.Tensor:
    tensor = torch.ones(N)[:4]
    tensor.note = ["kept"]  # type: ignore[attr-defined]
    return tensor


def _inference() -> torch.Tensor:
    with torch.inference_mode():
        return torch.ones(N)[:4]


#: Views of few elements of large tensors, of every kind that shows something else than its memory.
VIEWS: dict[str, Callable[[], torch.Tensor]] = {
    "slice": lambda: torch.arange(N)[5:9],
    "column": lambda: torch.arange(N).reshape(N // 4, 4)[:4, 1],
    "one element": lambda: torch.arange(N)[7],
    "none": lambda: torch.arange(N)[:0],
    "of zero size": lambda: torch.ones(N, 0)[:4],
    "requires grad": lambda: torch.ones(N, requires_grad=True)[:4].detach().requires_grad_(),
    "of a graph": lambda: torch.ones(N, requires_grad=True)[:4],
    "parameter": lambda: torch.nn.Parameter(torch.ones(N)[:4]),
    "frozen parameter": lambda: torch.nn.Parameter(torch.ones(N)[:4], requires_grad=False),
    "conj": lambda: torch.full((N,), 1 + 2j)[:4].conj(),
    "neg": lambda: torch.full((N,), 1 + 2j).conj().imag[:4],
    "conj transposed": lambda: torch.full((N // 4, 4), 1 + 2j)[:3].mH,
    "subclass": lambda: torch.ones(N).as_subclass(Marked)[:4],
    "subclass that requires grad": lambda: torch.ones(N).as_subclass(Marked)[:4].requires_grad_(),
    "attribute": _with_attribute,
    "inference": _inference,
    "expanded": lambda: torch.ones(1).expand(7),
    "shared": lambda: torch.ones(N).share_memory_()[:4],
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(N), 0.1, 0, torch.qint8)[:4],
    "coo": lambda: torch.sparse_coo_tensor(
        torch.zeros(1, N).long()[:, :3], torch.ones(N)[:3], (9,)
    ),
    "coo that requires grad": lambda: torch.eye(4).to_sparse().requires_grad_(),
    "csr": lambda: torch.eye(4).to_sparse_csr(),
    "csc": lambda: torch.eye(4).to_sparse_csc(),
    "bsr": lambda: torch.eye(4).to_sparse_bsr((2, 2)),
    "bsc": lambda: torch.eye(4).to_sparse_bsc((2, 2)),
    "of none, sparse": lambda: torch.zeros(4, 4).to_sparse(),
}


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach().as_subclass(torch.Tensor) if type(tensor) is Marked else tensor
    if tensor.is_quantized:
        return tensor.dequantize()
    tensor = tensor if tensor.layout is torch.strided else tensor.to_dense()
    return tensor.resolve_conj().resolve_neg()


def far_ends() -> tuple[MessageQueue, MessageQueue]:
    pytest.importorskip("zmq", reason="remote readers need pyzmq")
    writer = MessageQueue(1, 0, settings=SETTINGS)
    return writer, MessageQueue.create_from_handle(writer.export_handle(), 0, settings=SETTINGS)


@pytest.fixture(scope="module", params=["near", "views", "far"])
def channel(request: pytest.FixtureRequest) -> Iterator[Callable[[Any], Any]]:
    """Sends an object and returns what arrives."""
    near = request.param != "far"
    writer, reader = (lambda w, r: (w, r[0]))(*both_ends()) if near else far_ends()
    with reader, writer:

        def send(obj: Any) -> Any:
            writer.enqueue(obj, timeout=20)
            return reader.dequeue(timeout=20, copy=request.param != "views")

        yield send


@pytest.mark.filterwarnings("ignore:.*(quant|Sparse|storage|beta).*")
@pytest.mark.parametrize("kind", VIEWS)
def test_a_view_sends_what_it_shows(kind: str, channel: Callable[[Any], Any]) -> None:
    tensor = VIEWS[kind]()
    encoder = Encoder()
    encoder.dump(tensor)
    size = sum(map(len, encoder.parts)) + sum(buffer.nbytes for buffer in encoder.buffers)
    assert size < 2000, "more than the view travels"
    # In a message that has a block, so that buffers are lent.
    arrived, filler, again = channel([tensor, np.ones(50_000), tensor])
    assert again is arrived and filler.sum() == 50_000
    assert type(arrived) is type(tensor) and arrived.layout is tensor.layout
    assert (arrived.dtype, arrived.shape) == (tensor.dtype, tensor.shape)
    assert arrived.requires_grad == tensor.requires_grad
    assert vars(arrived) == vars(tensor)
    assert torch.equal(_dense(arrived), _dense(tensor))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_large_tensors_of_every_kind_are_lent(requires_grad: bool) -> None:
    writer, (reader,) = both_ends()
    sent = torch.ones(N).as_subclass(Marked).requires_grad_(requires_grad)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        writer.enqueue([sent, torch.nn.Parameter(torch.ones(N)), torch.ones(N).conj()])
        arrived = reader.dequeue(copy=False)
    begin = reader._reader.ring.base
    end = begin + reader._reader.ring.view.nbytes
    assert all(begin <= tensor.data_ptr() < end for tensor in arrived)
    assert arrived[0].requires_grad == requires_grad and type(arrived[0]) is Marked


def test_tensors_that_reduce_themselves_are_left_to_it() -> None:
    writer, (reader,) = both_ends()
    slotted: Any = torch.ones(3).as_subclass(WithSlots)
    slotted.note = "kept"
    writer.enqueue([torch.ones(2).as_subclass(Itself), slotted])
    first, second = reader.dequeue()
    assert first.tolist() == [5.0, 5.0] and isinstance(second, WithSlots)
    assert getattr(second, "note", "") == "kept"


def test_dicts_arrive_as_what_they_are() -> None:
    writer, (reader,) = both_ends()
    sent = OrderedDict([(2, "b"), (1, {"t": torch.empty(0, 3), -1: (None, 1.5)}), ("x", {})])
    writer.enqueue(sent)
    arrived = reader.dequeue()
    assert type(arrived) is OrderedDict and list(arrived) == [2, 1, "x"]
    assert arrived[1]["t"].shape == (0, 3) and arrived[1][-1] == (None, 1.5)


# --- what cannot be pickled -----------------------------------------------------------------------


class Refuses:
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __reduce__(self) -> Any:
        raise self.error


class BadText(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text either")

    __repr__ = __str__


def _endless() -> list[Any]:
    inner: list[Any] = []
    for _ in range(100_000):
        inner = [inner]
    return inner


UNPICKLABLE: dict[str, Callable[[], Any]] = {
    "lambda": lambda: lambda: 0,
    "generator": lambda: (i for i in range(3)),
    "memoryview": lambda: memoryview(b"x"),
    "file": lambda: open("/dev/null"),  # noqa: SIM115
    "class of a function": lambda: type("Local", (), {})(),
    "after a large buffer": lambda: [np.zeros(N), torch.zeros(N), b"x" * N, lambda: 0],
    "nested too deep": _endless,
    "strided buffer": lambda: pickle.PickleBuffer(np.zeros((4, 4))[:, 1]),
    "an error without a text": lambda: Refuses(BadText()),
    "out of memory": lambda: Refuses(MemoryError()),
}


@pytest.mark.parametrize("kind", UNPICKLABLE)
def test_what_cannot_be_pickled_moves_nothing(kind: str, channel: Callable[[Any], Any]) -> None:
    assert channel("before") == "before"
    with pytest.raises(InvalidArgumentError, match=r"enqueue\(obj\): a .* cannot be pickled"):
        channel(UNPICKLABLE[kind]())
    assert channel({"after", 1}) == {"after", 1}


def test_an_exit_while_pickling_moves_nothing(channel: Callable[[Any], Any]) -> None:
    for error in (SystemExit(3), KeyboardInterrupt(), GeneratorExit()):
        with pytest.raises(type(error)):
            channel([b"x" * N, np.zeros(N), Refuses(error)])
        assert channel("after") == "after"


# --- what cannot be unpickled ---------------------------------------------------------------------


class Bad:
    """Unpickles into an error."""

    def __init__(self, error: BaseException, *ballast: Any) -> None:
        self.arguments = (error, *ballast)

    def __reduce__(self) -> Any:
        return _raise, self.arguments


def _raise(error: BaseException, *_: Any) -> None:
    raise error


class Stop(BaseException):
    """Not an Exception, as of some libraries that time calls out."""


@pytest.mark.usefixtures("either_end")
@pytest.mark.parametrize("ends", [both_ends, far_ends])
@pytest.mark.parametrize("size", [10, 10_000, N], ids=["batch", "slot", "block"])
def test_what_does_not_unpickle_is_used_up_and_the_next_arrives(ends: Any, size: int) -> None:
    writer, reader = ends()
    reader = reader if isinstance(reader, MessageQueue) else reader[0]
    bad = [ValueError("x"), MemoryError(), BadTextByName(), SystemExit(3), Stop("timed out")]
    with reader, writer:
        for copy in (True, False):
            for error in bad:
                writer.enqueue(Bad(error, np.zeros(size, np.uint8)))
            writer.enqueue({"next": 1})
            for error in bad:
                expected = CommunicatorError if isinstance(error, Exception) else type(error)
                with pytest.raises(expected):
                    reader.dequeue(timeout=20, copy=copy)
            assert reader.dequeue(timeout=20) == {"next": 1}
            with pytest.raises(CommTimeoutError):
                reader.dequeue(timeout=0)


class BadTextByName(BadText):
    """Pickled by its class: without arguments."""

    def __reduce__(self) -> Any:
        return BadTextByName, ()


def test_a_message_that_names_what_is_not_there_is_used_up() -> None:
    writer, (reader,) = both_ends()
    for stream in (b"\x80\x05cnowhere\nnothing\n.", b"\x80\x05", b"\x80\xff.", b"\x80\x05K\x01"):
        assert writer._end.put_pickle(stream)
    writer.enqueue("next")
    for _ in range(4):
        with pytest.raises(CommunicatorError, match=r"arrived whole and cannot be unpickled"):
            reader.dequeue()
    assert reader.dequeue() == "next"


@pytest.mark.parametrize("size", [10, N])
def test_ctrl_c_while_unpickling_leaves_the_message_on_all_channels(size: int) -> None:
    writer, reader = far_ends()
    with reader, writer:
        writer.enqueue([Once(), b"x" * size])
        Once.times = 0
        with pytest.raises(KeyboardInterrupt):
            reader.dequeue(timeout=20)
        assert reader.dequeue(timeout=20) == ["unpickled", b"x" * size]


class Once:
    times = 0

    def __reduce__(self) -> Any:
        return _once, ()


def _once() -> str:
    Once.times += 1
    if Once.times == 1:
        raise KeyboardInterrupt
    return "unpickled"
