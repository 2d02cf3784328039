"""The custom, quantized and mscclpp all-reduce as functions (functional/allreduce.py)."""

from .functional.allreduce import *  # noqa: F403
from .functional.allreduce import __all__ as __all__
