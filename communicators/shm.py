"""CPU shared memory as functions (functional/shm.py)."""

from .functional.shm import *  # noqa: F403
from .functional.shm import __all__ as __all__
