"""A bound on what one call may allocate: beyond it, machines swap or kill the process."""

from simplernn_jax.devices import host_memory
from simplernn_jax.errors import UserError


def check_memory(num_bytes: int, what: str, advice: str) -> None:
    """Compare bytes to be allocated with the memory of this machine.

    Raises:
      UserError: they are more than half of it; begins with `what` and ends with `advice`.
    """
    total = host_memory()
    if total is not None and num_bytes > total // 2:
        raise UserError(
            f"{what}: needs {num_bytes / 1e9:,.1f} GB, more than half of the {total / 1e9:,.1f} GB "
            f"of memory of this machine; {advice}"
        )
