"""Train a language model, or resume training one.

    python scripts/train.py --config configs/base.py --workdir runs/base
    python scripts/train.py --config configs/base.py --workdir runs/mine \\
        --config.data.source=my_texts/ --config.train.steps=2000
    python scripts/train.py --minutes=5 --size=auto --config.data.source=my_texts/ \\
        --workdir runs/mine

--minutes is the time of the whole command; the number of steps follows from the measured speed.
--size=auto chooses the model too. With --minutes, --config is optional.

Running the same command again resumes bit-exactly, and so does --workdir of a run alone, with the
configuration saved there. SIGTERM and Ctrl-C save first and exit with code 75. A second signal
stops at once, also with 75 (with --distributed: kills the process, code 137): the run resumes from
its last checkpoint. Bad input exits with code 2 and a one-line error.

With --distributed, this is one of several processes, on one or more hosts, that share the workdir.
When one dies, is suspended, or becomes unreachable (no heartbeat for 20 s), the others exit within
a minute, with code 76. Restrict the coordinator port to these hosts. See scripts/launch_local.sh.
"""

import bootstrap

if __name__ == "__main__":
    bootstrap.start(resumes=True)

import gc
import os

from absl import flags, logging

from simplernn_jax.cli import command_line, process_start
from simplernn_jax.cli.config_files import define_config_flag, read_config
from simplernn_jax.config import Config
from simplernn_jax.errors import EXIT_INTERRUPTED, UserError

define_config_flag()
flags.DEFINE_alias("minutes", "config.train.minutes")
_SIZE = flags.DEFINE_enum(
    "size",
    "given",
    ["given", "auto"],
    "auto: layers, width, batches, tokenizer, precision, dropout and optimizer of a new run are "
    "chosen by --minutes, the text and the machine, except fields that are given.",
)
command_line.define_plugin_flag()
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder for checkpoints, metrics and tokenized text; created if missing."
)
_DISTRIBUTED = flags.DEFINE_boolean(
    "distributed",
    False,
    "Join a multi-process run. SLURM, Open MPI before version 5, and Kubernetes with jax[k8s] are "
    "detected; otherwise set --coordinator, --num_processes and --process_id.",
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of the process with --process_id 0."
)
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "Number of processes.", lower_bound=1, upper_bound=2**20
)
_PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "Index of this process.", lower_bound=0, upper_bound=2**20
)
_TIMEOUT = flags.DEFINE_integer(
    "join_timeout",
    120,
    "Seconds to wait for all processes to join.",
    lower_bound=1,
    upper_bound=10**6,
)


def main() -> int:
    """Train; return 0 at the end, `EXIT_INTERRUPTED` if a signal stopped it."""
    cluster = (_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    if not _DISTRIBUTED.value:
        if cluster != (None, None, None):
            raise UserError("--coordinator, --num_processes, --process_id: only with --distributed")
        return _train()
    from simplernn_jax.parallel import supervisor

    supervisor.supervise()
    from simplernn_jax.parallel import distributed

    def train_together() -> int:
        with distributed.joined(*cluster, _TIMEOUT.value):
            if not distributed.is_coordinator():
                logging.set_verbosity(logging.WARNING)
            return _train()

    # At a normal exit, JAX and threads would wait for the other processes.
    command_line.exit_with(train_together, leave=os._exit)


def _train() -> int:
    command_line.load_plugins()
    saved, is_auto = _saved_config(), _SIZE.value == "auto"
    has_config = flags.FLAGS["config"].value is not None
    base: str | Config = ""
    if saved and (is_auto or not has_config):
        logging.info("the configuration of this run: %s", saved)
        base = saved
    elif not has_config and any(
        flags.FLAGS[f"config.train.{name}"].value for name in ("minutes", "init_from")
    ):
        base = Config()
    elif not has_config and _WORKDIR.value:
        raise UserError(
            f"--workdir={_WORKDIR.value}: not a run; check the path, or start a run there with "
            "--config, such as --config configs/base.py, or with --minutes=5 --size=auto"
        )
    config = read_config(base)
    if not _WORKDIR.value:
        raise UserError("no --workdir: specify a folder for the run, such as --workdir runs/mine")
    workdir = command_line.expand_path(_WORKDIR.value, "workdir")
    from simplernn_jax.cli.compilation_cache import use_compilation_cache
    from simplernn_jax.devices import check_devices
    from simplernn_jax.training.loop import train
    from simplernn_jax.training.minutes import auto_size

    check_devices()
    use_compilation_cache()
    if is_auto and not saved:
        auto_size(config, workdir)
    gc.freeze()  # imported modules stay: garbage collections during tracing skip them
    result = train(config, workdir, started=process_start.STARTED)
    return EXIT_INTERRUPTED if result.interrupted_by else 0


def _saved_config() -> str:
    """Return the path of the configuration of an existing run; empty for a new one."""
    workdir = os.path.expanduser(_WORKDIR.value or "")
    path = os.path.join(workdir, "config.json")
    is_run = os.path.isfile(path) and os.path.isdir(os.path.join(workdir, "checkpoints"))
    return path if workdir and is_run else ""


if __name__ == "__main__":
    command_line.run(main)
