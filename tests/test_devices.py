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


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"/proc/meminfo": ["MemTotal: 100 kB", "MemFree: 3 kB", "SwapTotal: 11 kB"]}, 111 * 1024),
        (
            {
                "/proc/meminfo": ["MemTotal: 100 kB", "SwapTotal: 0 kB"],
                "/proc/self/cgroup": ["0::/a/b"],
                "/sys/fs/cgroup/a/b/memory.max": ["max"],
                "/sys/fs/cgroup/a/memory.max": ["7000"],
                "/sys/fs/cgroup/memory.max": ["9000"],
            },
            7000,
        ),
        (
            {
                "/proc/meminfo": ["MemTotal: 100 kB", "SwapTotal: 0 kB"],
                "/proc/self/cgroup": ["5:cpu:/x", "4:memory:/x"],
                "/sys/fs/cgroup/memory/x/memory.limit_in_bytes": ["5000"],
                "/sys/fs/cgroup/memory/memory.limit_in_bytes": ["9223372036854771712"],
            },
            5000,
        ),
    ],
)
def test_memory_is_the_least_of_machine_and_control_groups(monkeypatch, files, expected):
    def lines(path):
        try:
            return files[path.replace("/./", "/")]
        except KeyError:
            raise FileNotFoundError(path) from None

    monkeypatch.setattr(devices, "_lines", lines)
    assert devices.device_memory(jax.devices()[0]) == expected


def test_memory_of_this_machine():
    assert 10**8 < devices.device_memory(jax.devices()[0]) < 2**60
