"""Writes text with a trained model: the prompt and its continuation go to standard output.

    python scripts/sample.py --workdir runs/base --prompt "def main("
    cat story.txt | python scripts/sample.py --workdir runs/base --prompt_file -

The same seed and settings write the same text. With --temperature=0 the most probable token is
taken every time, which often repeats itself; 0.8 writes freely, above 1 wildly.
"""

import io
import sys
from pathlib import Path

from absl import flags

from simplernn_jax import command_line, load_model
from simplernn_jax.errors import UserError

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the training run to write with.")
_PROMPT = flags.DEFINE_string("prompt", None, "Text to continue; without one, a new document.")
_PROMPT_FILE = flags.DEFINE_string(
    "prompt_file", None, "UTF-8 file to continue; - is standard input."
)
_MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens", 400, "Tokens to write at most.", lower_bound=0
)
_TEMPERATURE = flags.DEFINE_float(
    "temperature", 0.8, "0 takes the best token; higher is freer.", lower_bound=0
)
_TOP_K = flags.DEFINE_integer(
    "top_k", 0, "Draw among the k best tokens only; 0 is off.", lower_bound=0
)
_TOP_P = flags.DEFINE_float(
    "top_p",
    1.0,
    "Draw among the best tokens that together reach this probability only; 1 is off.",
    lower_bound=0,
    upper_bound=1,
)
_SEED = flags.DEFINE_integer("seed", 0, "Another seed writes another text.", lower_bound=0)


def main() -> None:
    """Loads the newest whole checkpoint of --workdir and writes until EOS or --max_new_tokens."""
    if not _WORKDIR.value:
        raise UserError("--workdir is missing; name the folder of a training run")
    prompt = _read_prompt()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal may know fewer characters than text
    from simplernn_jax.compilation_cache import use_compilation_cache
    from simplernn_jax.inference import generate_text

    use_compilation_cache()
    model, tokenizer, _ = load_model(_WORKDIR.value)
    unwritten = [prompt]  # waits for the first text, so that bad input leaves no half output

    def write(pieces: list[str]) -> None:
        sys.stdout.write("".join(unwritten + pieces))
        sys.stdout.flush()
        unwritten.clear()

    generate_text(
        model,
        tokenizer,
        prompt,
        max_new_tokens=_MAX_NEW_TOKENS.value,
        temperature=_TEMPERATURE.value,
        top_k=_TOP_K.value,
        top_p=_TOP_P.value,
        seed=_SEED.value,
        on_text=write,
    )
    write(["\n"])


def _read_prompt() -> str:
    if _PROMPT.value is not None and _PROMPT_FILE.value is not None:
        raise UserError("--prompt and --prompt_file exclude each other; give one of them")
    if _PROMPT_FILE.value is None:
        where, data = "--prompt", (_PROMPT.value or "").encode("utf-8", "surrogateescape")
    elif _PROMPT_FILE.value == "-":
        where, data = "standard input", sys.stdin.buffer.read()
    else:
        where, data = _PROMPT_FILE.value, _read_file(Path(_PROMPT_FILE.value))
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: invalid UTF-8 at byte {error.start}; give UTF-8 text") from error


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"--prompt_file={path}: {error.strerror}; name a readable file") from error


if __name__ == "__main__":
    command_line.run(main)
