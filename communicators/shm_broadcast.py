"""MessageQueue, under vLLM's name for its module (message_queue/queue.py)."""

from .message_queue.queue import Handle as Handle
from .message_queue.queue import MessageQueue as MessageQueue
from .message_queue.queue import ShmRingBuffer as ShmRingBuffer
