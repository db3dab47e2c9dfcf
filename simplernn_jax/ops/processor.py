"""The processor's instruction set, as far as programs depend on it."""

import functools
from pathlib import Path


def processor_lines() -> list[str]:
    """Return the lines of /proc/cpuinfo, if any, that identify the instruction set."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    kinds = ("vendor_id", "model", "flags", "Features", "CPU part")
    return sorted({line for line in lines if line.startswith(kinds)})


@functools.cache
def has_fast_bfloat16() -> bool:
    """Return whether XLA multiplies bfloat16 faster than float32 on this CPU.

    It does with AMX, and with AVX-512 BF16 on AMD (measured on Zen 5: 1.4 times the tokens/s). On
    Intel, AVX-512 BF16 alone is no faster than float32, and conversions come on top.
    """
    words = set(" ".join(processor_lines()).split())
    return "amx_bf16" in words or {"AuthenticAMD", "avx512_bf16"} <= words
