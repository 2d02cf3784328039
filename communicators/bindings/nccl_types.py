"""The types and values of nccl.h, and which torch dtypes and reductions they stand for."""

from __future__ import annotations

import ctypes
from ctypes import c_char_p, c_int, c_size_t, c_uint, c_void_p
from enum import IntEnum
from typing import Any

import torch
from torch.distributed import ReduceOp

from ..errors import InvalidArgumentError

ncclResult_t = c_int
ncclComm_t = c_void_p
ncclWindow_t = c_void_p
cudaStream_t = c_void_p
buffer_type = c_void_p

#: Flag of ncclCommWindowRegister: every rank registers the same offsets (NCCL_WIN_COLL_SYMMETRIC).
NCCL_WIN_COLL_SYMMETRIC = 1


class ncclUniqueId(ctypes.Structure):
    """NCCL_UNIQUE_ID_BYTES is 128."""

    _fields_ = (("internal", ctypes.c_byte * 128),)


_UNDEFINED = -(2**31)  # NCCL_CONFIG_UNDEF_INT: NCCL chooses


class ncclConfig_t(ctypes.Structure):
    """The settings of one communicator, as of NCCL 2.18; later NCCLs take the shorter struct.

    Of the fields, `blocking`, `cgaClusterSize`, `minCTAs`, `maxCTAs`, `netName` and `splitShare`
    are the user's; each keeps NCCL's own choice until it is set.
    """

    _fields_ = (
        ("size", c_size_t),
        ("magic", c_uint),
        ("version", c_uint),
        ("blocking", c_int),
        ("cgaClusterSize", c_int),
        ("minCTAs", c_int),
        ("maxCTAs", c_int),
        ("netName", c_char_p),
        ("splitShare", c_int),
    )

    def __init__(self, **fields: Any) -> None:
        chosen = {
            name: _UNDEFINED
            for name in ("blocking", "cgaClusterSize", "minCTAs", "maxCTAs", "splitShare")
        }
        super().__init__(
            size=ctypes.sizeof(type(self)),
            magic=0xCAFEBEEF,
            version=21800,
            **(chosen | fields),
        )


class ncclDataTypeEnum(IntEnum):
    """ncclDataType_t. The fp8 types exist from NCCL 2.24 on."""

    ncclInt8 = 0
    ncclUint8 = 1
    ncclInt32 = 2
    ncclUint32 = 3
    ncclInt64 = 4
    ncclUint64 = 5
    ncclFloat16 = 6
    ncclFloat32 = 7
    ncclFloat64 = 8
    ncclBfloat16 = 9
    ncclFloat8e4m3 = 10
    ncclFloat8e5m2 = 11

    @classmethod
    def from_torch(cls, dtype: torch.dtype) -> int:
        """The value for a torch dtype; InvalidArgumentError for one that NCCL cannot add."""
        try:
            return int(_DTYPES[dtype])
        except KeyError:
            accepted = ", ".join(str(known).removeprefix("torch.") for known in _DTYPES)
            raise InvalidArgumentError(
                f"NCCL has no data type for {dtype}; it has {accepted}"
            ) from None


_DTYPES = {
    torch.int8: ncclDataTypeEnum.ncclInt8,
    torch.uint8: ncclDataTypeEnum.ncclUint8,
    torch.int32: ncclDataTypeEnum.ncclInt32,
    torch.uint32: ncclDataTypeEnum.ncclUint32,
    torch.int64: ncclDataTypeEnum.ncclInt64,
    torch.uint64: ncclDataTypeEnum.ncclUint64,
    torch.float16: ncclDataTypeEnum.ncclFloat16,
    torch.float32: ncclDataTypeEnum.ncclFloat32,
    torch.float64: ncclDataTypeEnum.ncclFloat64,
    torch.bfloat16: ncclDataTypeEnum.ncclBfloat16,
    torch.float8_e4m3fn: ncclDataTypeEnum.ncclFloat8e4m3,
    torch.float8_e5m2: ncclDataTypeEnum.ncclFloat8e5m2,
}

#: What NCCL adds, by the version that began to.
FP8_DTYPES = frozenset({torch.float8_e4m3fn, torch.float8_e5m2})
FP8_SINCE = 22400


class ncclRedOpTypeEnum(IntEnum):
    """ncclRedOp_t."""

    ncclSum = 0
    ncclProd = 1
    ncclMax = 2
    ncclMin = 3
    ncclAvg = 4

    @classmethod
    def from_torch(cls, op: ReduceOp | ReduceOp.RedOpType) -> int:
        """The value for a torch ReduceOp; InvalidArgumentError for one that NCCL lacks."""
        for torch_op, value in (
            (ReduceOp.SUM, cls.ncclSum),
            (ReduceOp.PRODUCT, cls.ncclProd),
            (ReduceOp.MAX, cls.ncclMax),
            (ReduceOp.MIN, cls.ncclMin),
            (ReduceOp.AVG, cls.ncclAvg),
        ):
            if op == torch_op:
                return int(value)
        raise InvalidArgumentError(f"NCCL reduces by SUM, PRODUCT, MAX, MIN or AVG, not by {op}")


#: Of the reductions of base.BY, those that NCCL has.
NCCL_REDUCTIONS = {
    "sum": int(ncclRedOpTypeEnum.ncclSum),
    "avg": int(ncclRedOpTypeEnum.ncclAvg),
    "product": int(ncclRedOpTypeEnum.ncclProd),
    "min": int(ncclRedOpTypeEnum.ncclMin),
    "max": int(ncclRedOpTypeEnum.ncclMax),
}
