"""Readers of a MessageQueue on other hosts: ZeroMQ over TCP, encrypted and authenticated by CURVE.

The writer binds one ROUTER socket; each reader connects a DEALER. The handle carries the server's
public key, which never crosses the wire in clear (CurveZMQ, rfc.zeromq.org/spec/26), and a token.
A peer without the key does not get past the handshake; one without the token is not listened to. No
byte that the writer receives is ever unpickled, and a reader unpickles only what came encrypted by
the holder of the server's secret key.

    frames to the writer     HELLO rank token      ACK number of messages read      BYE
    frames to a reader       WELCOME   READY   DATA number kind, stream, buffers...   PING   CLOSED
                             REFUSED text

A message waits in the writer until every expected reader has joined, and at most `window` messages
are unread by any reader: that is what enqueue() waits for. The connection is the reader's life: TCP
repeats what a broken link lost, and a connection that the peer's kernel ended, or that was silent
for HEARTBEAT_TIMEOUT_MS, is a dead peer. A thread of the writer, asleep in poll() unless a frame
arrives, serves readers that join or read while the program does something else.
"""

from __future__ import annotations

import errno
import socket as sockets
import struct

import zmq

from ..errors import RefusedError

HEARTBEAT_MS = 5_000
HEARTBEAT_TIMEOUT_MS = 60_000
LINGER_MS = 5_000  # how long close() may take to send what was enqueued
KEY_BYTES, TOKEN_BYTES = 40, 32  # a CURVE key in Z85; of our own

HELLO, ACK, BYE = b"H", b"A", b"B"
WELCOME, READY, DATA, PING, CLOSED, REFUSED = b"W", b"S", b"D", b"P", b"C", b"R"
HELLO_FRAME = struct.Struct(f"!cq{TOKEN_BYTES}s")
ACK_FRAME = struct.Struct("!cQ")
DATA_FRAME = struct.Struct("!cQB")

BROKEN_HANDSHAKE = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)


def open_socket(context: zmq.Context, kind: int, address: str) -> zmq.Socket:
    if not zmq.has("curve"):
        raise RefusedError(
            "message queue: readers on other hosts need a pyzmq whose libzmq has CURVE (the wheels "
            "on PyPI have it); this one was built without"
        )
    socket = context.socket(kind)
    socket.sndhwm = socket.rcvhwm = 0  # the window bounds both
    socket.linger = LINGER_MS
    socket.heartbeat_ivl = HEARTBEAT_MS
    socket.heartbeat_timeout = HEARTBEAT_TIMEOUT_MS
    socket.ipv6 = "[" in address
    return socket


def option_of(socket: zmq.Socket, option: int) -> int:
    value = socket.getsockopt(option)
    assert isinstance(value, int)
    return value


def nobody_listens(address: str) -> bool:
    """Whether the host of `address` is there and refuses a connection to that port."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    family = sockets.AF_INET6 if host.startswith("[") else sockets.AF_INET
    with sockets.socket(family, sockets.SOCK_STREAM) as probe:
        probe.settimeout(0.2)
        return probe.connect_ex((host.strip("[]"), int(port))) == errno.ECONNREFUSED
