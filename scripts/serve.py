"""Serve a trained model over an OpenAI-compatible HTTP API.

    python scripts/serve.py --workdir runs/base
    curl http://127.0.0.1:8000/v1/completions -d '{"prompt": "def main(", "max_tokens": 50}'

Needs the extra `serve`: pip install -e '.[serve]'. SIGTERM and Ctrl-C end the server once the
running requests have ended, or after --drain_timeout.
"""

import bootstrap

if __name__ == "__main__":
    bootstrap.start()

import os
import re
import signal
import tempfile

from absl import flags

from simplernn_jax.cli import command_line
from simplernn_jax.errors import UserError
from simplernn_jax.files import read_file

_MODEL = command_line.ModelFlags()
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on.")
_PORT = flags.DEFINE_integer(
    "port", 8000, "Port to listen on; 0 takes a free one.", lower_bound=0, upper_bound=65535
)
_MODEL_NAME = flags.DEFINE_string(
    "model_name", None, "Name of the model; by default that of the workdir."
)
_SLOTS = flags.DEFINE_integer(
    "slots", 32, "Sequences decoded at a time.", lower_bound=1, upper_bound=1024
)
_MAX_QUEUE = flags.DEFINE_integer(
    "max_queue", 256, "Prompts that may wait; more are rejected with 429.", lower_bound=1
)
_MAX_CONNECTIONS = flags.DEFINE_integer(
    "max_connections", 4096, "Open connections; more are rejected with 503.", lower_bound=1
)
_CACHE_MB = flags.DEFINE_integer(
    "cache_mb", 256, "Maximum size of the prefix cache, in MB.", lower_bound=0
)
_STATE_DIR = flags.DEFINE_string(
    "state_dir", None, "Folder of named states, created if missing; without it they are temporary."
)
_STATES_MB = flags.DEFINE_integer(
    "states_mb", 1024, "Maximum total size of named states, in MB.", lower_bound=0
)
_API_KEY_FILE = flags.DEFINE_string(
    "api_key_file", None, "File with the key that clients must send; or set SIMPLERNN_JAX_API_KEY."
)
_ALLOW_REMOTE = flags.DEFINE_bool(
    "allow_remote_without_key", False, "Allow listening on non-loopback addresses without a key."
)
_ALLOW_ORIGIN = flags.DEFINE_string("allow_origin", None, "Origin allowed by CORS, or *.")
_DRAIN_TIMEOUT = flags.DEFINE_float(
    "drain_timeout", 30, "Seconds in which running requests may finish after SIGTERM."
)
flags.register_validator(
    _DRAIN_TIMEOUT, lambda value: 0 <= value <= 86_400, "must be in [0, 86400] seconds"
)
flags.register_validator(
    _ALLOW_ORIGIN,
    lambda value: value in (None, "*") or re.fullmatch(r"https?://[!-.0-@[-~]+", value),
    "must be * or an origin such as https://example.org, in lower case and without a path",
)

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def main() -> None:
    """Load a checkpoint of --workdir and serve it until SIGTERM or Ctrl-C."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until the server can reload
    workdir = _MODEL.workdir
    key = _api_key()
    if key is None and _HOST.value not in _LOOPBACK and not _ALLOW_REMOTE.value:
        raise UserError(
            f"--host={_HOST.value}: anyone who reaches it could use the server; "
            "set --api_key_file, or pass --allow_remote_without_key"
        )
    try:
        from simplernn_jax.serving.app import make_app
        from simplernn_jax.serving.http import protect
        from simplernn_jax.serving.server import Server, listen
        from simplernn_jax.serving.service import Reload, Service
        from simplernn_jax.serving.states import StateFolder
        from simplernn_jax.serving.worker import Worker
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed; run: pip install -e '.[serve]'") from error
    from simplernn_jax.checkpoint.folder import choose_checkpoint
    from simplernn_jax.data.chat_template import ChatTemplate
    from simplernn_jax.inference.loading import is_exported

    model, tokenizer, config = _MODEL.load()
    path = "" if is_exported(workdir) else choose_checkpoint(workdir, _MODEL.checkpoint).path

    def reload_model() -> Reload | None:
        if not path:
            return None  # an export does not change
        newest = choose_checkpoint(workdir, _MODEL.checkpoint).path
        if newest == path:
            return None
        new_model, new_tokenizer, new_config = _MODEL.load_again(workdir)
        new = new_config.model, new_config.data.template, new_tokenizer.to_json()
        if new != (config.model, config.data.template, tokenizer.to_json()):
            raise UserError(
                f"{newest}: another architecture, template or tokenizer; start the server again"
            )

        def note_use() -> None:
            nonlocal path
            path = newest

        return new_model, note_use

    with listen(_HOST.value, _PORT.value) as listener, tempfile.TemporaryDirectory() as temporary:
        state_dir = temporary
        if _STATE_DIR.value is not None:
            state_dir = command_line.expand_path(_STATE_DIR.value, "state_dir")
            os.makedirs(state_dir, exist_ok=True)
        worker = Worker(
            model,
            num_slots=_SLOTS.value,
            cache_bytes=_CACHE_MB.value * 10**6,
            max_waiting=_MAX_QUEUE.value,
        )
        service = Service(
            worker,
            tokenizer,
            model.config.vocab_size,
            model_name=_MODEL_NAME.value or os.path.basename(os.path.realpath(workdir)),
            states=StateFolder(state_dir, model, tokenizer, _STATES_MB.value * 10**6),
            template=ChatTemplate(config.data.template) if config.data.template else None,
            load_model=reload_model,
        )
        server = Server(
            service,
            protect(make_app(service), key, _ALLOW_ORIGIN.value, _hosts(key)),
            max_connections=_MAX_CONNECTIONS.value,
            drain_timeout=_DRAIN_TIMEOUT.value,
        )
        server.answer(listener)


def _api_key() -> bytes | None:
    """Read the key from its file or the environment."""
    if _API_KEY_FILE.value is None:
        where, key = "SIMPLERNN_JAX_API_KEY", os.environb.get(b"SIMPLERNN_JAX_API_KEY", b"").strip()
        if not key:
            return None
    else:
        where = _API_KEY_FILE.value
        key = read_file(command_line.expand_path(where, "api_key_file")).strip()
        if not key:
            raise UserError(f"{where}: holds no key; write one into it")
    if not re.fullmatch(rb"[!-~]+", key):
        raise UserError(f"{where}: a key has printable ASCII characters only, and no spaces")
    return key


def _hosts(key: bytes | None) -> frozenset[str] | None:
    """Return the names by which a server without a key may be called; None allows any."""
    if key is not None or _HOST.value not in _LOOPBACK:
        return None
    return frozenset((*_LOOPBACK, "[::1]"))


if __name__ == "__main__":
    command_line.run(main)
