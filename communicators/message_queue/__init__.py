"""The parts of MessageQueue; communicators/message_queue/queue.py is what programs import.

ring.py         the shared memory            native_ring.py    ctypes over native/shm/ring_api.cpp
ends.py         its writer and its readers   blocks.py         large messages in its arena
native_end.py   per-message fast path        plain.py          reads plain data without the module
wire.py         other hosts: the protocol    remote_writer.py, remote_reader.py    its two ends
codec.py        objects to bytes and back    handle.py         what a reader joins with
for_group.py    a queue for a group's ranks  process.py        does another process still run?
lifetime.py     lock, close, fork            deadline.py       seconds that are left
"""
