"""Every environment variable of the library, read once, on request, into one frozen object.

`Settings.from_environment()` reads; nothing reads at import. A `Settings` can be printed, passed
around and replaced in tests; its digest is compared across ranks where a value must agree.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from .errors import InvalidArgumentError, SettingsError


def _seconds(text: str) -> float:
    value = float(_plain(text))
    if not 0 < value < 1e9:  # nor nan
        raise ValueError
    return value


def _microseconds(text: str) -> int:
    value = int(_plain(text))
    if not 0 <= value <= 1_000_000:
        raise ValueError
    return value


def _flag(text: str) -> bool:
    return {"0": False, "1": True, "false": False, "true": True}[text.strip().lower()]


def _plain(text: str) -> str:
    """Python also takes 1_000 and digits of other scripts as numbers; here that is a slip."""
    if "_" in text or not text.isascii():
        raise ValueError
    return text


def _size(text: str) -> int:
    found = re.fullmatch(r"\s*(\d{1,18})\s*([kmg]?)(i?b)?\s*", _plain(text).lower())
    if found is None:
        raise ValueError
    value = int(found[1]) << {"": 0, "k": 10, "m": 20, "g": 30}[found[2]]
    if not 0 < value < 1 << 62:  # what a tensor or a file can have
        raise ValueError
    return value


def _one_of(*accepted: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        value = text.strip().upper()
        if value not in accepted:
            raise ValueError
        return value

    return parse


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


@dataclass(frozen=True)
class _Variable:
    name: str
    parse: Callable[[str], Any]
    accepted: str
    empty: bool = False  # an empty value means something other than an unset variable


def _setting(
    default: Any, name: str, parse: Callable[[str], Any], accepted: str, empty: bool = False
) -> Any:
    return field(default=default, metadata={"env": _Variable(name, parse, accepted, empty)})


@dataclass(frozen=True)
class Settings:
    """The settings of one process. Times are in the unit that the field's name says."""

    timeout_s: float = _setting(
        300.0, "COMMUNICATORS_TIMEOUT_S", _seconds, "seconds, a positive number"
    )
    """Deadline of every host-side wait: rendezvous, shared-memory collectives, queues."""

    spin_us: int = _setting(
        50, "COMMUNICATORS_SPIN_US", _microseconds, "microseconds, 0 to 1000000"
    )
    """How long a CPU rank spins for a peer before it sleeps on a futex. Ranks beyond the number of
    cores do not spin at all, whatever this says."""

    queue_spin_us: int = _setting(
        5000, "COMMUNICATORS_QUEUE_SPIN_US", _microseconds, "microseconds, 0 to 1000000"
    )
    """How long a MessageQueue's reader may spin when messages usually come sooner than that. A
    reader whose messages come further apart spins for `spin_us`, then sleeps."""

    shm_dir: str = _setting("/dev/shm", "COMMUNICATORS_SHM_DIR", str, "a directory on a tmpfs")
    """Where shared memory is taken from. Files there have no name, so none can be left behind."""

    shm_bytes: int = _setting(
        4 << 20, "COMMUNICATORS_SHM_BYTES", _size, "bytes, 1 or more, or a number with K, M or G"
    )
    """Shared memory that one rank contributes to one group, at most."""

    disable: tuple[str, ...] = _setting(
        (), "COMMUNICATORS_DISABLE", _names, "names of communicators, separated by commas"
    )
    """Communicators that are refused, by name (see `communicators doctor`)."""

    table_dir: str = _setting("", "COMMUNICATORS_TABLE_DIR", str, "a directory")
    """A directory of measured tables that is read before the ones that ship; a *.json there that is
    no table is an error."""

    native_dir: str = _setting("", "COMMUNICATORS_NATIVE_DIR", str, "a directory")
    """Where the native libraries are loaded from, instead of beside the package: another build."""

    nccl_so_path: str = _setting("", "COMMUNICATORS_NCCL_SO_PATH", str, "path of a libnccl")
    """The NCCL library to load, instead of the one that torch brings."""

    p2p_probe: bool = _setting(True, "COMMUNICATORS_P2P_PROBE", _flag, "0 or 1")
    """Prove peer access with a real copy, once per machine and boot; 0 trusts the driver alone."""

    p2p_probe_timeout_s: float = _setting(
        60.0, "COMMUNICATORS_P2P_PROBE_TIMEOUT_S", _seconds, "seconds, a positive number"
    )
    """Deadline of that proof for all pairs together; a pair without an answer counts as failed."""

    cache_dir: str = _setting("", "COMMUNICATORS_CACHE_DIR", str, "a directory")
    """Where proofs of peer access are kept; by default ~/.cache/communicators."""

    symmetric_memory: bool = _setting(False, "COMMUNICATORS_SYMMETRIC_MEMORY", _flag, "0 or 1")
    """Let `use_symmetric_memory` take tensors from NCCL's allocator and register them."""

    cuda_visible_devices: str | None = _setting(
        None, "CUDA_VISIBLE_DEVICES", str, "indices or UUIDs, separated by commas", empty=True
    )
    """CUDA's own variable: which GPUs this process may use. None: all. "": none."""

    cuda_device_order: str = _setting("", "CUDA_DEVICE_ORDER", str, "FASTEST_FIRST or PCI_BUS_ID")
    """CUDA's own variable: the order of the GPUs that indices count."""

    quick_codec: str = _setting(
        "", "COMMUNICATORS_QUICK_CODEC", _one_of("", "FP", "Q8", "Q6", "Q4"), "FP, Q8, Q6 or Q4"
    )
    """Allows the quantized all-reduce, with 16 (FP), 8, 6 or 4 bits per value. Unset: not used."""

    quick_least_bytes: int = _setting(
        2 << 20,
        "COMMUNICATORS_QUICK_LEAST_BYTES",
        _size,
        "bytes, 1 or more, or a number with K, M or G",
    )
    """Smallest tensor that the quantized all-reduce takes; two H200 gain from 2 MB on."""

    debug: bool = _setting(False, "COMMUNICATORS_DEBUG", _flag, "0 or 1")
    """Extra checks before each collective (shapes compared across ranks on the host)."""

    check_slot_bounds: bool = _setting(False, "KVCACHE_OPS_CHECK_BOUNDS", _flag, "0 or 1")
    """Cache writes raise for a slot past the cache, which they otherwise skip (synchronizes)."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Settings:
        """Reads the variables; SettingsError for one whose value is not accepted."""
        environment = os.environ if environment is None else environment
        values = {}
        for item in fields(cls):
            variable: _Variable = item.metadata["env"]
            text = environment.get(variable.name)
            if text is None or (text == "" and not variable.empty):
                continue
            try:
                values[item.name] = variable.parse(text)
            except (ValueError, KeyError):
                raise SettingsError(
                    f"{variable.name}={text!r} is not accepted; it takes {variable.accepted}"
                ) from None
        return cls(**values)

    def describe(self) -> list[tuple[str, Any, str]]:
        """(variable, value, accepted values) of every setting, for `communicators doctor`."""
        return [
            (
                item.metadata["env"].name,
                getattr(self, item.name),
                item.metadata["env"].accepted,
            )
            for item in fields(self)
        ]


def check_seconds(argument: str, given: float | None, settings: Settings) -> float:
    """`given` seconds, or the settings' deadline for None; InvalidArgumentError if it is none."""
    if given is None:
        return settings.timeout_s
    if isinstance(given, bool) or not isinstance(given, (int, float)) or not 0 <= given < 1e9:
        raise InvalidArgumentError(
            f"{argument}={given!r}: a number of seconds from 0 to below 1e9 is expected, or None "
            f"for COMMUNICATORS_TIMEOUT_S ({settings.timeout_s:g})"
        )
    return float(given)
