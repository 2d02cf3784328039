"""The workers of pytest-xdist share the cores: one compute thread each."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
