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

from simplernn_jax.cli import command_line
from simplernn_jax.errors import counted
from simplernn_jax.files import check_writable

_MODEL = command_line.ModelFlags()
_PROMPT = flags.DEFINE_string("prompt", None, "Prompt; empty starts a new document.")
_PROMPT_FILE = flags.DEFINE_string(
    "prompt_file", None, "UTF-8 file with the prompt; - is standard input."
)
_SAMPLING = command_line.SamplingFlags(max_new_tokens=400, temperature=0.8)
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
_LOOKUP = flags.DEFINE_bool(
    "lookup", True, "Decode several tokens at a time where text repeats; the text is the same."
)


def main() -> None:
    """Generate from a checkpoint of --workdir until EOS or --max_new_tokens.

    A single continuation is streamed; of several, each is printed below a header line.
    """
    save_path = None
    if _SAVE_STATE.value is not None:
        save_path = command_line.expand_path(_SAVE_STATE.value, "save_state")
        check_writable(save_path)
    prompt = command_line.read_text(_PROMPT.value, _PROMPT_FILE.value, name="prompt")
    model, tokenizer, _ = _MODEL.load()
    from simplernn_jax.inference import fork_state, generate_text, load_state, save_state
    from simplernn_jax.models.memory_estimate import check_generation

    max_new_tokens, settings = _SAMPLING.max_new_tokens, _SAMPLING.settings
    state = None
    if _LOAD_STATE.value is not None:
        state = load_state(os.path.expanduser(_LOAD_STATE.value), model, tokenizer)
    # Bad input is found here, before anything is printed.
    prefix = generate_text(model, tokenizer, prompt, state=state, max_new_tokens=0, **settings)
    batch_size = len(prefix.state.position) * _NUM_SAMPLES.value
    check_generation(model, batch_size, max_new_tokens)
    forked = fork_state(prefix.state, _NUM_SAMPLES.value)
    only_prefills = max_new_tokens == 0 and save_path is not None
    is_streamed = batch_size == 1 and not only_prefills
    if is_streamed:
        _write(prompt)
    texts = generate_text(
        model,
        tokenizer,
        state=forked,
        max_new_tokens=max_new_tokens,
        on_text=(lambda pieces: _write(pieces[0])) if is_streamed else None,
        lookup=_LOOKUP.value,
        context=prompt,
        **settings,
    )
    if is_streamed:
        _write("\n")
    elif not only_prefills:
        for number, text in enumerate(texts, 1):
            _write(f"--- {number} of {batch_size} ---\n{prompt}{text}\n")
    if save_path is not None:
        save_state(save_path, texts.state, model, tokenizer)
        in_prompt = len(tokenizer.encode(prompt)) + (state is None)  # with BOS
        new = int((texts.state.position - forked.position).sum())
        print(
            f"{save_path}: saved {os.path.getsize(save_path):,} bytes of decoder state, after "
            f"{counted(in_prompt, 'prompt token')} and {counted(new, 'new token')}",
            file=sys.stderr,
        )


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    command_line.run(main)
