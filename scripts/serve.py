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

_MODEL = command_line.ModelFlags()
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on.")
_PORT = flags.DEFINE_integer("port", 8000, "Port; 0 takes a free one.", 0, 65535)
_NAME = flags.DEFINE_string("model_name", None, "Name of the model; by default the workdir's.")
_SLOTS = flags.DEFINE_integer("slots", 32, "Sequences decoded at a time.", 1, 1024)
_MAX_QUEUE = flags.DEFINE_integer("max_queue", 256, "Prompts that may wait; 429 for more.", 1)
_MAX_CONNECTIONS = flags.DEFINE_integer(
    "max_connections", 4096, "Open connections; more are rejected with 503.", 1
)
_CACHE_MB = flags.DEFINE_integer("cache_mb", 256, "Size of the prefix cache in MB.", 0)
_STATE_DIR = flags.DEFINE_string(
    "state_dir", None, "Folder of named states, created if missing; without it they are temporary."
)
_STATES_MB = flags.DEFINE_integer("states_mb", 1024, "Size of all named states in MB.", 0)
_API_KEY_FILE = flags.DEFINE_string(
    "api_key_file", None, "File with the key that clients must send; or set SIMPLERNN_JAX_API_KEY."
)
_ALLOW_REMOTE = flags.DEFINE_bool(
    "allow_remote_without_key", False, "Allow listening on non-loopback addresses without a key."
)
_ALLOW_ORIGIN = flags.DEFINE_string("allow_origin", None, "Origin allowed by CORS, or *.")
_DRAIN_TIMEOUT = flags.DEFINE_float("drain_timeout", 30, "Seconds for requests after SIGTERM.")
flags.register_validator(_DRAIN_TIMEOUT, lambda x: 0 <= x <= 86_400, "must be in [0, 86400]")
flags.register_validator(
    _ALLOW_ORIGIN,
    lambda value: value in (None, "*") or re.fullmatch(r"https?://[!-.0-@[-~]+", value),
    "must be * or an origin such as https://example.org, in lower case and without a path",
)


def main() -> None:
    """Load a checkpoint of --workdir and serve it until SIGTERM or Ctrl-C."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until the server can reload
    workdir = _MODEL.workdir
    try:
        from simplernn_jax.serving import app, http, server, service, states, worker
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed; run: pip install -e '.[serve]'") from error
    key_file = _API_KEY_FILE.value and command_line.expand_path(_API_KEY_FILE.value, "api_key_file")
    key = http.read_key(key_file)
    if key is None and _HOST.value not in http.LOOPBACK and not _ALLOW_REMOTE.value:
        raise UserError(
            f"--host={_HOST.value}: anyone who reaches it could use the server; "
            "set --api_key_file, or pass --allow_remote_without_key"
        )
    from simplernn_jax.checkpoint.folder import CheckpointFolder, choose_checkpoint
    from simplernn_jax.data.chat_template import ChatTemplate
    from simplernn_jax.inference.loading import is_exported
    from simplernn_jax.models import LanguageModel

    def choose() -> str:
        if is_exported(workdir):  # which does not change
            return ""
        step, _ = choose_checkpoint(workdir, _MODEL.checkpoint)
        return CheckpointFolder(workdir).step_path(step)

    def load_other(in_use: str) -> tuple[str, LanguageModel] | None:
        selected = choose()
        if selected == in_use:
            return None
        model, other_tokenizer, other = _MODEL.load_again(workdir)
        new = other.model, other.data.template, other_tokenizer.to_json()
        if new != (config.model, template, tokenizer.to_json()):
            raise UserError(
                f"{workdir}: another architecture, template or tokenizer; start the server again"
            )
        return selected, model

    checkpoint = choose()
    model, tokenizer, config = _MODEL.load()
    template = config.data.template
    with (
        server.listen(_HOST.value, _PORT.value) as listener,
        tempfile.TemporaryDirectory() as folder,
    ):
        if _STATE_DIR.value is not None:
            folder = command_line.expand_path(_STATE_DIR.value, "state_dir")
            os.makedirs(folder, exist_ok=True)
        cache_bytes, states_bytes = _CACHE_MB.value * 10**6, _STATES_MB.value * 10**6
        served = service.Service(
            worker.Worker(model, _SLOTS.value, cache_bytes, _MAX_QUEUE.value),
            tokenizer,
            model.config.vocab_size,
            _NAME.value or os.path.basename(os.path.realpath(workdir)),
            states.StateFolder(folder, model, tokenizer, states_bytes),
            ChatTemplate(template) if template else None,
            checkpoint,
            load_other,
        )
        only_local = key is None and _HOST.value in http.LOOPBACK
        api = http.protect(app.make_app(served), key, _ALLOW_ORIGIN.value, only_local)
        server.Server(served, api, _MAX_CONNECTIONS.value, _DRAIN_TIMEOUT.value).answer(listener)


if __name__ == "__main__":
    command_line.run(main)
