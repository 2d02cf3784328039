"""One decode step over fixed buffers: run as it is, or recorded once as a CUDA graph."""

from __future__ import annotations

import torch
from torch import Tensor

from communicators import CommunicatorError
from communicators import parallel_state as ps

from .errors import JobError
from .kv_cache import PagedKVCache
from .model import DecodeInputs, LlamaModel

# The first run loads kernels and opens NCCL's connections, neither of which a capture permits; the
# second one shows that nothing is left to do.
WARM_UP_RUNS = 2


class DecodeStep:
    """``step() -> this rank's logits``, fp32 ``[S, part.vocab]``, of what the buffers hold then.

    After capture() a call replays the graph, and returns the same tensor each time, overwritten.
    """

    def __init__(self, model: LlamaModel, inputs: DecodeInputs, cache: PagedKVCache) -> None:
        self.model, self.inputs, self.cache = model, inputs, cache
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None

    @property
    def captured(self) -> bool:
        return self._graph is not None

    def __call__(self) -> Tensor:
        if self._graph is None:
            return self.model.decode(self.inputs, self.cache)
        assert self._logits is not None
        self._graph.replay()
        return self._logits

    def capture(self) -> None:
        """Run the step a few times as it is, then record it. Collective.

        Raises JobError where something in the step cannot be captured.
        """
        device = self.model.tp.device
        with ps.graph_capture() as context:
            for _ in range(WARM_UP_RUNS):
                self.model.decode(self.inputs, self.cache)
            torch.cuda.synchronize(device)
            graph = torch.cuda.CUDAGraph()
            try:
                # Only this thread's calls are held against the capture: NCCL's watchdog has its
                # own.
                with torch.cuda.graph(
                    graph, stream=context.stream, capture_error_mode="thread_local"
                ):
                    logits = self.model.decode(self.inputs, self.cache)
            except CommunicatorError:
                raise
            except RuntimeError as error:
                # The error that ended the capture comes before the one of ending it.
                first = error.__context__ or error
                raise JobError(
                    f"the decode step cannot be captured as a CUDA graph: {first}; --no-graph runs "
                    f"it without one"
                ) from error
        torch.cuda.synchronize(device)
        self._graph, self._logits = graph, logits

    def close(self) -> None:
        """Give the graph back; before its group is closed, since NCCL waits for its graphs."""
        if self._graph is not None:
            self._graph.reset()
            self._graph = self._logits = None
