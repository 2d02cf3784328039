"""Rotary position embedding, in place."""

from __future__ import annotations

from torch import Tensor

from kvcache_ops._native import op


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
    """Rotate pairs of each head of query and key by the angles of their positions, in place.

    Args:
        positions: int64, ``[N]`` or ``[B, S]``.
        query: ``[.., Hq * head_size]`` or ``[.., Hq, head_size]`` with the leading dimensions of
            ``positions``; fp32, fp16 or bf16. Token and head strides are free.
        key: the same with Hk heads, ``Hq % Hk == 0``, or None.
        head_size: elements of one head.
        cos_sin_cache: ``[max_position, rot]``, cosines then sines; a floating dtype of its own.
        is_neox: pairs are ``(k, k + rot/2)``; else (GPT-J) ``(2k, 2k + 1)``.
        rope_dim_offset: first rotated element of a head; ``rot + rope_dim_offset <= head_size``.
        inverse: rotate back.

    ``x, y = round(x c - y s), round(y c + x s)`` in fp32; the other elements stay. A position
    outside the cache leaves its token as it is and never reads out of bounds.

    Layout of a head, rot = 8, offset 0; equal letters make a pair::

        is_neox       | a b c d | a b c d | untouched ... |
        not is_neox   | a a b b c c d d   | untouched ... |
        a row of cos_sin_cache   | cos a b c d | sin a b c d |

    Raises:
        RuntimeError: an argument has a shape, dtype, device or stride that is not accepted.

    Source: J. Su et al., RoFormer (arXiv:2104.09864); the pairing of GPT-NeoX.

    Example:
        >>> q = torch.tensor([[1., 0., 0., 1.]])
        >>> cos_sin = torch.tensor([[0., 1., 1., 0.]])  # 90 degrees and 0 degrees
        >>> rotary_embedding(torch.tensor([0]), q, None, 4, cos_sin, True)
        >>> q
        tensor([[0., 0., 1., 1.]])
    """
    op("rotary_embedding", query)(
        positions, query, key, head_size, cos_sin_cache, is_neox, rope_dim_offset, inverse
    )
