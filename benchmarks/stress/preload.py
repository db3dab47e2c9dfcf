"""Libraries in C that change the calls of a process to the system."""

import os
import shlex
import subprocess
from pathlib import Path

from simplernn_jax.errors import UserError

_RECORD_BYTES = 8192


def build(name: str, folder: Path) -> Path:
    """Compile ``NAME.c`` of this folder for ``LD_PRELOAD``, into `folder`.

    Raises:
      UserError: there is no C compiler.
    """
    source, library = Path(__file__).with_name(f"{name}.c"), folder / f"{name}.so"
    compiler = shlex.split(os.environ.get("CC", "")) or ["cc"]
    command = [*compiler, "-O2", "-shared", "-fPIC", str(source), "-o", str(library), "-ldl"]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        raise UserError(f"{' '.join(command)}: {reason}; install a C compiler") from error
    return library


def failing_writes(
    library: Path, record: Path, folder: Path, first: int, count: int, error: int
) -> dict[str, str]:
    """Variables of a process whose writes below `folder` fail, as ``failing_writes.c`` says.

    `record` is made anew.
    """
    record.write_bytes(bytes(_RECORD_BYTES))
    return {
        "LD_PRELOAD": str(library),
        "FAILING_WRITES": f"{first} {count} {error} {record} {folder}",
    }


def read_calls(record: Path) -> tuple[int, str]:
    """Return the number of calls in a record of `failing_writes`, and the first that failed."""
    content = record.read_bytes()
    return int.from_bytes(content[:8], "little"), content[8:].partition(b"\0")[0].decode()
