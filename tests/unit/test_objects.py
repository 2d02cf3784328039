"""Objects as bytes: tensors as what they show, and what cannot be pickled as an error of ours."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from communicators import InvalidArgumentError
from communicators.groups import objects
from tests.unit.awkward import OBJECTS, REFUSED, TENSORS, big, same

ROUND_TRIPS = TENSORS | OBJECTS


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_a_value_is_what_it_was(name: str) -> None:
    value = ROUND_TRIPS[name]()
    got = objects.loads("test", objects.dumps("test", value), "rank 0")
    assert same(got, value)


CUT = [
    "view", "column", "empty view", "conj of a view", "parameter of a view", "quantized view",
    "subclass of a view", "expanded", "array",
]  # fmt: skip


@pytest.mark.parametrize("name", CUT)
def test_a_view_is_pickled_as_what_it_shows(name: str) -> None:
    assert len(objects.dumps("test", ROUND_TRIPS[name]())) < 6000


def test_views_of_every_kind_of_tensor_are_small() -> None:
    cut = big()[3:6]
    noted = cut.view(-1)
    noted.note = 1  # type: ignore[attr-defined]
    sparse = torch.sparse_coo_tensor(torch.arange(1 << 16)[None, 5:7], cut[:2], (10,))
    wide = torch.zeros(1, dtype=torch.complex128).expand(1 << 30)
    module = torch.nn.Linear(1, 3)
    module.bias = torch.nn.Parameter(cut)
    for value in (noted, cut.clone().requires_grad_()[1:], sparse, wide, module, [cut, cut.t()]):
        assert len(objects.dumps("test", value)) < 4000
    back = objects.loads("test", objects.dumps("test", wide), "rank 0")
    assert back.shape == wide.shape and back.stride() == (0,)


def test_one_tensor_twice_is_one_and_two_views_are_two() -> None:
    x = torch.arange(4.0)
    a, b, c = objects.loads("test", objects.dumps("test", [x, x, x.view(2, 2)]), "rank 0")
    assert a is b
    a[0] = 9
    assert c[0, 0] == 0, "tensors that share memory arrive apart"


def test_what_arrives_can_be_written_and_differentiated() -> None:
    x, p = objects.loads(
        "test", objects.dumps("test", [torch.ones(3), torch.nn.Parameter(torch.ones(2))]), "rank 0"
    )
    x += 1
    assert x.tolist() == [2, 2, 2]
    (p * 3).sum().backward()
    assert p.grad.tolist() == [3, 3]


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_pickled_is_an_error_of_ours(name: str) -> None:
    with pytest.raises(
        InvalidArgumentError, match=r"^test: an? .* cannot be pickled .* on rank 3: "
    ):
        objects.dumps("test", REFUSED[name](), 3)


dtypes = st.sampled_from(
    [torch.float32, torch.bool, torch.float8_e5m2, torch.complex64, torch.uint64, torch.bfloat16]
)


@st.composite
def views(draw: st.DrawFn) -> torch.Tensor:
    """A tensor that was sliced, permuted, expanded and unfolded in any order."""
    shape = draw(st.lists(st.integers(0, 6), min_size=1, max_size=3))
    count = torch.Size(shape).numel()
    x = torch.arange(count).remainder(2).to(draw(dtypes)).view(shape)
    for _ in range(draw(st.integers(0, 4))):
        dim = draw(st.integers(0, max(x.dim() - 1, 0)))
        what = draw(st.sampled_from(["slice", "swap", "expand", "unfold", "select"]))
        if what == "expand":
            x = x[None].expand(draw(st.integers(1, 9)), *x.shape)
        elif x.dim() and what == "slice":
            x = x.narrow(dim, 0, draw(st.integers(0, x.size(dim))))
        elif x.dim() and what == "swap":
            x = x.transpose(dim, 0)
        elif x.dim() and x.size(dim) and what == "unfold":
            x = x.unfold(dim, draw(st.integers(1, x.size(dim))), draw(st.integers(1, 3)))
        elif x.dim() and x.size(dim) and what == "select":
            x = x.select(dim, draw(st.integers(0, x.size(dim) - 1)))
    return x


@settings(max_examples=150, deadline=None)
@given(x=views())
def test_any_view_arrives_and_costs_what_it_shows(x: torch.Tensor) -> None:
    payload = objects.dumps("test", x)
    assert len(payload) <= min(x.nbytes, x.untyped_storage().nbytes()) + 300
    assert same(objects.loads("test", payload, "rank 0"), x)
