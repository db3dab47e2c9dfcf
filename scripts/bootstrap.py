"""The first import of every script: it runs under any Python, with or without an environment.

    import bootstrap

    if __name__ == "__main__":
        bootstrap.start()

All other imports are below that; see `simplernn_jax.cli.process_start`.
"""

import os
import signal
import sys


def start(*, resumes: bool = False) -> None:
    """Prepare this process; `resumes`: an interrupted script resumes when it is run again."""
    # Until handlers are installed, signals wait.
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    if os.path.isdir(os.path.join(root, "simplernn_jax")):  # a checkout, which may not be installed
        sys.path.append(root)
    from simplernn_jax.cli import process_start

    process_start.start(root, resumes=resumes)
