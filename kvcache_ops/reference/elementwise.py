"""Norms, RoPE and activations, in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _weight_rows(weight: Tensor | None, x: Tensor) -> Tensor | float:
    if weight is None:
        return 1.0
    if weight.dim() == 1:
        return weight.float()
    return weight.float().view(weight.shape[0], *([1] * (x.dim() - 2)), weight.shape[1])


def rms_norm(out: Tensor, input: Tensor, weight: Tensor | None, epsilon: float) -> None:
    x = input.float()
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)
    out.copy_((normed * _weight_rows(weight, input)).to(out.dtype).view(out.shape))


def fused_add_rms_norm(
    input: Tensor, residual: Tensor, weight: Tensor | None, epsilon: float
) -> None:
    z = (input.float() + residual.float()).to(input.dtype)
    residual.copy_(z)
    rms_norm(input, z, weight, epsilon)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, is_neox: bool) -> Tensor:
    """x [..., rot] with cos and sin [..., rot/2] in fp32, rounded once to x.dtype."""
    if is_neox:
        a, b = x.float().chunk(2, dim=-1)
    else:
        a, b = x[..., ::2].float(), x[..., 1::2].float()
    first, second = (a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype)
    if is_neox:
        return torch.cat([first, second], dim=-1)
    return torch.stack([first, second], dim=-1).flatten(-2)


def rotary_embedding(
    positions: Tensor,
    query: Tensor,
    key: Tensor | None,
    head_size: int,
    cos_sin_cache: Tensor,
    is_neox: bool,
    rope_dim_offset: int = 0,
    inverse: bool = False,
) -> None:
    rot = cos_sin_cache.shape[1]
    cos, sin = cos_sin_cache[positions].float().chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(-2), (-sin if inverse else sin).unsqueeze(-2)
    for x in (query, key):
        if x is None:
            continue
        flat = x.dim() == positions.dim() + 1
        heads = x.unflatten(-1, (-1, head_size)) if flat else x
        part = heads[..., rope_dim_offset : rope_dim_offset + rot]
        part.copy_(rotate(part, cos, sin, is_neox))


def silu_and_mul(result: Tensor, input: Tensor) -> None:
    x, y = input.chunk(2, dim=-1)
    result.copy_(F.silu(x.float()).to(x.dtype) * y)


def mul_and_silu(out: Tensor, input: Tensor) -> None:
    x, y = input.chunk(2, dim=-1)
    out.copy_(x * F.silu(y.float()).to(y.dtype))


def gelu_and_mul(out: Tensor, input: Tensor) -> None:
    x, y = input.chunk(2, dim=-1)
    out.copy_(F.gelu(x.double()).float().to(x.dtype) * y)


def gelu_tanh_and_mul(out: Tensor, input: Tensor) -> None:
    x, y = input.chunk(2, dim=-1)
    out.copy_(F.gelu(x.double(), approximate="tanh").float().to(x.dtype) * y)


def fatrelu_and_mul(out: Tensor, input: Tensor, threshold: float) -> None:
    x, y = input.chunk(2, dim=-1)
    out.copy_(torch.where(x.float() > threshold, x, torch.zeros_like(x)) * y)


def swigluoai_and_mul(out: Tensor, input: Tensor, alpha: float = 1.702, limit: float = 7.0) -> None:
    gate = input[..., ::2].float().clamp(max=limit)
    up = input[..., 1::2].float().clamp(min=-limit, max=limit)
    out.copy_(((up + 1) * gate * torch.sigmoid(alpha * gate)).to(out.dtype))
