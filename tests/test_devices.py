"""JAX's devices and their memory."""

from unittest import mock

import jax
import pytest

from simplernn_jax import devices
from simplernn_jax.errors import UserError


def test_a_missing_platform_is_one_line(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    for error in (AssertionError(), RuntimeError("Unable to initialize backend 'cuda'")):
        monkeypatch.setattr(jax, "devices", mock.Mock(side_effect=error))
        with pytest.raises(UserError, match=r"no device \(JAX_PLATFORMS='cuda'\): .*; unset"):
            devices.check_devices()


@pytest.fixture
def files(monkeypatch):
    """Files of the machine by path, in place of its own."""
    texts = {}

    def text(path):
        try:
            return texts[path]
        except KeyError:
            raise FileNotFoundError(path) from None

    monkeypatch.setattr(devices, "_text", text)
    return texts


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        ({}, 25 * 4096),
        (
            {
                "/proc/self/cgroup": "0::/a/b",
                "/sys/fs/cgroup/a/b/memory.max": "max",
                "/sys/fs/cgroup/a/memory.max": "7000",
                "/sys/fs/cgroup/memory.max": "9000",
            },
            7000,
        ),
    ],
)
def test_memory_is_the_least_of_machine_and_control_groups(monkeypatch, files, group, expected):
    files.update(group)
    monkeypatch.setattr("os.sysconf", {"SC_PHYS_PAGES": 25, "SC_PAGE_SIZE": 4096}.get)
    assert devices.device_memory(jax.devices()[0]) == expected


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        ({}, 64),
        ({"/sys/fs/cgroup/a/cpu.max": "max 100000"}, 64),
        ({"/sys/fs/cgroup/a/cpu.max": "350000 100000"}, 4),
        ({"/sys/fs/cgroup/a/cpu.max": "max 100000", "/sys/fs/cgroup/cpu.max": "5000 100000"}, 1),
    ],
)
def test_cores_are_at_most_those_of_the_control_groups(monkeypatch, files, group, expected):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(64), raising=False)
    files.update({"/proc/self/cgroup": "0::/a"} | group)
    assert devices.available_cores() == expected
