"""The build backend: the surrounding torch is used, and asked for only where there is none."""

import importlib.util
from pathlib import Path

import pytest
import torch

BACKEND = Path(__file__).parents[2] / "native" / "packaging" / "build_backend.py"


@pytest.fixture
def backend():
    pytest.importorskip("scikit_build_core")
    spec = importlib.util.spec_from_file_location("build_backend", BACKEND)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_torch_of_this_environment_is_found_without_importing_it(backend, monkeypatch):
    monkeypatch.delenv("DEVICE_COMMUNICATORS_TORCH_DIR", raising=False)
    # What pip sets to isolate a build must not hide it.
    monkeypatch.setenv("PYTHONPATH", "/nonexistent")
    assert Path(backend.surrounding_torch()) == Path(torch.__file__).parent
    assert backend.TORCH_REQUIREMENT not in backend.get_requires_for_build_wheel()


def test_torch_is_asked_for_only_where_there_is_none(backend, monkeypatch):
    monkeypatch.setattr(backend, "surrounding_torch", lambda: None)
    assert backend.TORCH_REQUIREMENT in backend.get_requires_for_build_wheel()
    assert backend.TORCH_REQUIREMENT in backend.get_requires_for_build_editable()


def test_the_variable_points_at_a_torch(backend, monkeypatch):
    monkeypatch.setenv("DEVICE_COMMUNICATORS_TORCH_DIR", "/somewhere/torch")
    assert backend.surrounding_torch() == "/somewhere/torch"
