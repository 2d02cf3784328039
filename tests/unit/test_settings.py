"""Settings: read once, checked, printable."""

import dataclasses
from pathlib import Path

import pytest

from communicators import Settings, SettingsError


def test_defaults_and_values():
    assert Settings.from_environment({}) == Settings()
    settings = Settings.from_environment(
        {
            "COMMUNICATORS_TIMEOUT_S": "1.5",
            "COMMUNICATORS_SHM_BYTES": "8M",
            "COMMUNICATORS_DISABLE": "cpu, pynccl",
            "COMMUNICATORS_DEBUG": "1",
            "COMMUNICATORS_SPIN_US": "",
        }
    )
    assert settings.timeout_s == 1.5
    assert settings.shm_bytes == 8 << 20
    assert settings.disable == ("cpu", "pynccl")
    assert settings.debug
    assert settings.spin_us == Settings().spin_us


@pytest.mark.parametrize(
    ("variable", "value", "accepted"),
    [
        ("COMMUNICATORS_TIMEOUT_S", "soon", "seconds"),
        ("COMMUNICATORS_TIMEOUT_S", "-1", "seconds"),
        ("COMMUNICATORS_SPIN_US", "1e9", "microseconds"),
        ("COMMUNICATORS_SHM_BYTES", "4 MB of it", "bytes"),
        ("COMMUNICATORS_DEBUG", "yes", "0 or 1"),
        *[
            ("COMMUNICATORS_TIMEOUT_S", text, "seconds")
            for text in ("nan", "inf", "-inf", "0", "1_0")
        ],
        *[("COMMUNICATORS_SPIN_US", text, "microseconds") for text in ("-1", "1.5", "9" * 5000)],
        *[
            ("COMMUNICATORS_SHM_BYTES", text, "bytes")
            for text in ("4X", "-4M", "0", "4KM", "M", "4bM", "9" * 30, "99999999999G", "\u0664M")
        ],
        ("COMMUNICATORS_QUICK_CODEC", "Q5", "FP, Q8, Q6 or Q4"),
    ],
)
def test_a_wrong_value_names_variable_value_and_what_is_accepted(variable, value, accepted):
    with pytest.raises(SettingsError) as caught:
        Settings.from_environment({variable: value})
    assert variable in str(caught.value)
    assert repr(value) in str(caught.value)
    assert accepted in str(caught.value)


def test_every_setting_is_frozen_and_described():
    settings = Settings()
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.timeout_s = 1  # type: ignore[misc]
    assert len(settings.describe()) == len(dataclasses.fields(Settings))
    assert all(name.isupper() for name, _, _ in settings.describe())


def test_the_readme_lists_every_variable():
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    for name, _, _ in Settings().describe():
        assert f"| `{name}` |" in readme, name
