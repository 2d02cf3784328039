"""RMSNorm, alone and with the residual addition before it."""

from __future__ import annotations

from torch import Tensor

from kvcache_ops._native import op


def rms_norm(out: Tensor, input: Tensor, weight: Tensor | None, epsilon: float) -> None:
    """``out = round(x * rsqrt(mean(x^2) + epsilon) * weight)`` over the last dimension.

    Args:
        out: the shape of ``input``, contiguous, written.
        input: rank 2 to 4, ``[..., h]``, fp32, fp16 or bf16; the leading strides are honoured. A
            last dimension that is not contiguous is copied first.
        weight: ``[h]``, or ``[G, h]`` with ``G == input.size(0)`` (row chosen by dim 0), or None
            for 1. Dtype of ``input``.
        epsilon: added to the mean of the squares.

    fp32 inside and one rounding at the end. The order of the sum depends on h alone: a row gives
    the same bits in every batch.

    Layout::

        input, out   | row of h elements | row | ...     weight | h factors |, one row for all

    Raises:
        RuntimeError: an argument has a shape, dtype, device or stride that is not accepted.

    Source: B. Zhang, R. Sennrich, Root Mean Square Layer Normalization (arXiv:1910.07467).

    Example:
        >>> out = torch.empty(1, 2)
        >>> rms_norm(out, torch.tensor([[3., 4.]]), torch.ones(2), 0.0)
        >>> out
        tensor([[0.8485, 1.1314]])
    """
    op("rms_norm", input)(out, input, weight, epsilon)


def fused_add_rms_norm(
    input: Tensor, residual: Tensor, weight: Tensor | None, epsilon: float
) -> None:
    """Residual addition and RMSNorm in place: ``residual += input; input = rms_norm(residual)``.

    Args:
        input: ``[..., h]``, fp32, fp16 or bf16, last dimension contiguous; receives the norm.
        residual: shape and dtype of ``input``; receives ``z = round(input + residual)``.
        weight: as in :func:`rms_norm`.
        epsilon: added to the mean of the squares.

    The variance is that of the rounded z. Each tensor's own leading strides are honoured.

    Layout::

        residual   | z of row 0 | z of row 1 | ...       z = round(input + residual)
        input      | norm of z  | norm of z  | ...

    Raises:
        RuntimeError: an argument has a shape, dtype, device or stride that is not accepted.

    Source: B. Zhang, R. Sennrich, Root Mean Square Layer Normalization (arXiv:1910.07467).

    Example:
        >>> x, residual = torch.tensor([[1., 1.]]), torch.tensor([[2., 3.]])
        >>> fused_add_rms_norm(x, residual, torch.ones(2), 0.0)
        >>> x, residual
        (tensor([[0.8485, 1.1314]]), tensor([[3., 4.]]))
    """
    op("fused_add_rms_norm", input)(input, residual, weight, epsilon)
