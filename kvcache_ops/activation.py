"""Gated activations: two halves of a row in, one half out."""

from __future__ import annotations

from torch import Tensor

from kvcache_ops._native import op


def silu_and_mul(result: Tensor, input: Tensor) -> None:
    """SwiGLU gate: ``result = silu(x) * y`` of the first half x and the second half y.

    Args:
        result: ``[..., d]``, written. Contiguous, any pointer alignment.
        input: ``[..., 2 d]``, contiguous; fp32, fp16 or bf16, the dtype of ``result``. Any d.

    ``silu(x) = x / (1 + e^-x)`` in fp32, rounded to the dtype, then the product in fp32, rounded
    again: bit for bit ``F.silu(x) * y``.

    Layout of a row::

        input   | x: d elements | y: d elements |        result   | d elements |

    Raises:
        RuntimeError: an argument has a shape, dtype, device or stride that is not accepted.

    Source: N. Shazeer, GLU Variants Improve Transformer (arXiv:2002.05202).

    Example:
        >>> out = torch.empty(2, 3)
        >>> silu_and_mul(out, torch.tensor([[0., 1., 2., 1., 1., 1.]]).expand(2, 6).contiguous())
        >>> out[0]
        tensor([0.0000, 0.7311, 1.7616])
    """
    op("silu_and_mul", input)(result, input)


def mul_and_silu(out: Tensor, input: Tensor) -> None:
    """SwiGLU with the gate second: ``out = x * silu(y)``.

    Args:
        out: ``[..., d]``, written. Contiguous.
        input: ``[..., 2 d]``, contiguous; fp32, fp16 or bf16, the dtype of ``out``.

    Rounds like :func:`silu_and_mul`.

    Layout of a row::

        input   | x: d elements | y: d elements |        out   | d elements |

    Raises:
        RuntimeError: an argument has a shape, dtype, device or stride that is not accepted.

    Source: N. Shazeer, GLU Variants Improve Transformer (arXiv:2002.05202).

    Example:
        >>> out = torch.empty(1, 1)
        >>> mul_and_silu(out, torch.tensor([[3., 1.]]))
        >>> out
        tensor([[2.1932]])
    """
    op("mul_and_silu", input)(out, input)


def gelu_and_mul(out: Tensor, input: Tensor) -> None:
    """GeGLU gate: ``out = gelu(x) * y`` with the exact GELU, ``0.5 x (1 + erf(x / sqrt 2))``.

    Args:
        out: ``[..., d]``, written. Contiguous.
        input: ``[..., 2 d]``, contiguous; fp32, fp16 or bf16, the dtype of ``out``.

    Rounds like :func:`silu_and_mul`.

    Layout of a row::

        input   | x: d elements | y: d elements |        out   | d elements |

    Raises:
        RuntimeError: an argument has a shape, dtype, device or stride that is not accepted.

    Source: D. Hendrycks, K. Gimpel, Gaussian Error Linear Units (arXiv:1606.08415).

    Example:
        >>> out = torch.empty(1, 1)
        >>> gelu_and_mul(out, torch.tensor([[1., 2.]]))
        >>> out
        tensor([[1.6827]])
    """
    op("gelu_and_mul", input)(out, input)


def gelu_tanh_and_mul(out: Tensor, input: Tensor) -> None:
    """GeGLU gate with the tanh GELU: ``0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) * y``.

    Args:
        out: ``[..., d]``, written. Contiguous.
        input: ``[..., 2 d]``, contiguous; fp32, fp16 or bf16, the dtype of ``out``.

    Rounds like :func:`silu_and_mul`.

    Layout of a row::

        input   | x: d elements | y: d elements |        out   | d elements |

    Raises:
        RuntimeError: an argument has a shape, dtype, device or stride that is not accepted.

    Source: D. Hendrycks, K. Gimpel, Gaussian Error Linear Units (arXiv:1606.08415).

    Example:
        >>> out = torch.empty(1, 1)
        >>> gelu_tanh_and_mul(out, torch.tensor([[1., 2.]]))
        >>> out
        tensor([[1.6824]])
    """
    op("gelu_tanh_and_mul", input)(out, input)


def fatrelu_and_mul(out: Tensor, input: Tensor, threshold: float) -> None:
    """FATReLU gate: ``out = (x if x > threshold else 0) * y``; a NaN x counts as 0.

    Args:
        out: ``[..., d]``, written. Contiguous.
        input: ``[..., 2 d]``, contiguous; fp32, fp16 or bf16, the dtype of ``out``.
        threshold: compared in fp32.

    Not ``max(x, threshold)``: values under the threshold become 0. The product is rounded once.

    Layout of a row::

        input   | x: d elements | y: d elements |        out   | d elements |

    Raises:
        RuntimeError: an argument has a shape, dtype, device or stride that is not accepted.

    Source: M. Kurtz et al., Inducing and Exploiting Activation Sparsity (ICML 2020).

    Example:
        >>> out = torch.empty(1, 2)
        >>> fatrelu_and_mul(out, torch.tensor([[0.4, 0.6, 2., 2.]]), 0.5)
        >>> out
        tensor([[0.0000, 1.2000]])
    """
    op("fatrelu_and_mul", input)(out, input, threshold)


def swigluoai_and_mul(out: Tensor, input: Tensor, alpha: float = 1.702, limit: float = 7.0) -> None:
    """Clamped SwiGLU of gpt-oss: ``(u + 1) * g * sigmoid(alpha g)`` of interleaved g and u.

    Args:
        out: ``[..., d]``, written. Contiguous.
        input: ``[..., 2 d]``, contiguous, **interleaved**: ``g = input[2i]``, ``u = input[2i+1]``;
            fp32, fp16 or bf16, the dtype of ``out``.
        alpha: slope of the sigmoid.
        limit: g is clamped from above, u from both sides.

    fp32 throughout, one rounding at the end.

    Layout of a row::

        input   | g0 u0 g1 u1 ... : 2 d elements |        out   | d elements |

    Raises:
        RuntimeError: an argument has a shape, dtype, device or stride that is not accepted.

    Source: openai/gpt-oss, the reference model's ``swiglu``.

    Example:
        >>> out = torch.empty(1, 1)
        >>> swigluoai_and_mul(out, torch.tensor([[1., 1.]]))
        >>> out
        tensor([[1.6916]])
    """
    op("swigluoai_and_mul", input)(out, input, alpha, limit)
