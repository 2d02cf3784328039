"""The ranks themselves."""

from __future__ import annotations

import time

import pytest

from tests.ranks import Rank, run_fresh


def hang(rank: Rank) -> None:
    time.sleep(100 if rank.rank == 1 else 0)


def test_a_hanging_rank_is_reported() -> None:
    with pytest.raises(AssertionError, match=r"ranks \[1\] of 2 hang in hang") as failure:
        run_fresh(2, hang, deadline_s=8)
    assert "in hang" in str(failure.value) and "test_ranks.py" in str(failure.value)
