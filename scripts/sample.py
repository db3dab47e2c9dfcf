"""Generate text with a trained model: prompt and continuation go to standard output.

    python scripts/sample.py --workdir runs/base --prompt "def main("
    cat story.txt | python scripts/sample.py --workdir runs/base --prompt_file -

The same seed and settings give the same text. --temperature=0 is greedy decoding (often
repetitive); higher values are more random.

Prefill a long prompt once and reuse it; the first of these commands prints no text:

    python scripts/sample.py --workdir=W --prompt_file=book.txt --max_new_tokens=0 --save_state=book
    python scripts/sample.py --workdir=W --load_state=book --num_samples=3
"""

import bootstrap

if __name__ == "__main__":
    bootstrap.start()

import os
import sys

from absl import flags

from simplernn_jax import command_line
from simplernn_jax.errors import UserError, counted
from simplernn_jax.files import check_writable

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a training run.")
_CHECKPOINT = command_line.define_checkpoint_flag()
command_line.define_plugin_flag()
_QUANTIZE = command_line.define_quantize_flag()
_PROMPT = flags.DEFINE_string("prompt", None, "Prompt; empty starts a new document.")
_PROMPT_FILE = flags.DEFINE_string(
    "prompt_file", None, "UTF-8 file with the prompt; - is standard input."
)
_MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens", 400, "Maximum number of new tokens.", lower_bound=0, upper_bound=2**31 - 1
)
_TEMPERATURE = flags.DEFINE_float(
    "temperature", 0.8, "0 is greedy decoding; higher values are more random.", lower_bound=0
)
_TOP_K = flags.DEFINE_integer(
    "top_k", 0, "Sample from the k most probable tokens; 0 disables it.", lower_bound=0
)
_TOP_P = flags.DEFINE_float(
    "top_p",
    1.0,
    "Nucleus sampling: sample from the most probable tokens that together reach this probability, "
    "in (0, 1]; 1 disables it.",
)
flags.register_validator(_TOP_P, lambda value: 0 < value <= 1, "must be in (0, 1]")
_SEED = flags.DEFINE_integer(
    "seed", 0, "Random seed for sampling.", lower_bound=0, upper_bound=2**32 - 1
)
_NUM_SAMPLES = flags.DEFINE_integer(
    "num_samples",
    1,
    "Number of continuations; the prompt is prefilled once.",
    lower_bound=1,
    upper_bound=2**31 - 1,
)
_SAVE_STATE = flags.DEFINE_string(
    "save_state", None, "Path to save the decoder state to, after the last token."
)
_LOAD_STATE = flags.DEFINE_string(
    "load_state", None, "Saved decoder state to resume from; --prompt is appended to it."
)


def main() -> None:
    """Generate from a checkpoint of --workdir until EOS or --max_new_tokens.

    A single continuation is streamed; of several, each is printed below a header line.
    """
    if not _WORKDIR.value:
        raise UserError("no --workdir: specify the folder of a training run, such as runs/base")
    workdir = command_line.expand_path(_WORKDIR.value, "workdir")
    _check_save_state()
    prompt = command_line.read_text(_PROMPT.value, _PROMPT_FILE.value, name="prompt")
    from simplernn_jax.inference import fork_state, generate_text, load_state, save_state
    from simplernn_jax.memory_estimate import check_generation

    model, tokenizer, config = command_line.load_model(workdir, _CHECKPOINT.value, _QUANTIZE.value)
    settings = {
        "temperature": _TEMPERATURE.value,
        "top_k": _TOP_K.value,
        "top_p": _TOP_P.value,
        "seed": _SEED.value,
    }
    state = None
    if _LOAD_STATE.value is not None:
        state = load_state(os.path.expanduser(_LOAD_STATE.value), model, tokenizer)
    # Bad input is found here, before anything is printed.
    prefix = generate_text(model, tokenizer, prompt, state=state, max_new_tokens=0, **settings)
    batch_size = len(prefix.state.position) * _NUM_SAMPLES.value
    check_generation(config.model, batch_size, _MAX_NEW_TOKENS.value)
    forked = fork_state(prefix.state, _NUM_SAMPLES.value)
    only_prefills = _MAX_NEW_TOKENS.value == 0 and _SAVE_STATE.value is not None
    is_streamed = batch_size == 1 and not only_prefills
    if is_streamed:
        _write(prompt)
    texts = generate_text(
        model,
        tokenizer,
        state=forked,
        max_new_tokens=_MAX_NEW_TOKENS.value,
        on_text=(lambda pieces: _write(pieces[0])) if is_streamed else None,
        **settings,
    )
    if is_streamed:
        _write("\n")
    elif not only_prefills:
        for number, text in enumerate(texts, 1):
            _write(f"--- {number} of {batch_size} ---\n{prompt}{text}\n")
    if _SAVE_STATE.value is not None:
        path = os.path.expanduser(_SAVE_STATE.value)
        save_state(path, texts.state, model, tokenizer)
        in_prompt = len(tokenizer.encode(prompt)) + (state is None)  # with BOS
        new = int((texts.state.position - forked.position).sum())
        print(
            f"{path}: saved {os.path.getsize(path):,} bytes of decoder state, after "
            f"{counted(in_prompt, 'prompt token')} and {counted(new, 'new token')}",
            file=sys.stderr,
        )


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _check_save_state() -> None:
    """Reject a path that would fail after generation."""
    if _SAVE_STATE.value is None:
        return
    if not _SAVE_STATE.value:
        raise UserError("--save_state is empty; specify a file in a writable folder")
    path = os.path.expanduser(_SAVE_STATE.value)
    advice = "specify a new or regular file in a writable folder"
    try:
        check_writable(path)
    except (OSError, ValueError) as error:  # a name may hold a NUL character
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"--save_state={path}: cannot be written ({reason}); {advice}") from error


if __name__ == "__main__":
    command_line.run(main)
