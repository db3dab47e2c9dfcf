"""Talk to a chat model in the terminal.

    python scripts/chat.py --workdir runs/chat

The decoder state is carried from turn to turn: turn 1,000 takes as long as turn 1. Lines that begin
with / are commands; /help lists them. Ctrl-D ends the conversation. The model must have been
trained on conversations (--config.data.template).
"""

import bootstrap

if __name__ == "__main__":
    bootstrap.start()

import os
import sys
from collections.abc import Iterator

from absl import flags

from simplernn_jax.cli import command_line
from simplernn_jax.errors import UserError, counted

_MODEL = command_line.ModelFlags()
_SYSTEM = flags.DEFINE_string("system", "", "System message at the beginning.")
_SAMPLING = command_line.SamplingFlags(max_new_tokens=1000, temperature=0.0)

_HELP = """\
/undo        remove the last question and its answer
/reset       start a new conversation
/fork NAME   keep a copy of the conversation in memory; /load NAME returns to it
/save FILE   save the decoder state to a file
/load NAME   continue a fork, or a saved file
/help        show this list"""


def main() -> None:
    """Answer one line of standard input after another."""
    model, tokenizer, config = _MODEL.load()
    from simplernn_jax.data.chat_template import ChatTemplate
    from simplernn_jax.inference import Conversation, load_state, save_state

    if not config.data.template:
        raise UserError(
            f"{_MODEL.workdir}: not trained on conversations (--config.data.template); "
            "use python scripts/sample.py"
        )
    template = ChatTemplate(config.data.template)
    conversation = Conversation(model, tokenizer, template, system=_SYSTEM.value)
    forks: dict[str, Conversation] = {}

    def run_command(name: str, argument: str) -> str:
        nonlocal conversation
        if name in ("save", "load", "fork") and not argument:
            raise UserError(f"/{name}: needs a name after it")
        match name:
            case "help":
                return _HELP
            case "undo":
                conversation.undo()
            case "reset":  # not to a state that was loaded
                conversation = Conversation(model, tokenizer, template, system=_SYSTEM.value)
            case "fork":
                forks[argument] = conversation.fork()
            case "save":
                if conversation.state is None:
                    raise UserError("/save: nothing was said yet")
                save_state(os.path.expanduser(argument), conversation.state, model, tokenizer)
                return f"(saved to {argument}; /load {argument} continues from there)"
            case "load" if argument in forks:
                conversation = forks[argument].fork()
            case "load":
                state = load_state(os.path.expanduser(argument), model, tokenizer)
                conversation = Conversation(model, tokenizer, template, state=state)
            case _:
                raise UserError(f"/{name}: no such command; /help lists them")
        return f"({counted(len(conversation.turns), 'turn')})"

    settings = _SAMPLING.settings
    for line in _lines():
        try:
            if line.startswith("/"):
                name, _, argument = line[1:].partition(" ")
                print(run_command(name, argument.strip()), flush=True)
                continue
            conversation.ask(
                line,
                max_new_tokens=_SAMPLING.max_new_tokens,
                **settings | {"seed": (settings["seed"] + len(conversation.turns)) % 2**32},
                on_text=lambda text: print(text, end="", flush=True),
            )
            print(flush=True)
        except (UserError, OSError) as error:
            print(f"error: {error}", file=sys.stderr, flush=True)


def _lines() -> Iterator[str]:
    """Yield the lines of standard input that are not blank, with a prompt on a terminal."""
    if sys.stdin.isatty():
        import readline  # noqa: F401 - gives `input` its history
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt)
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise UserError(f"standard input: invalid UTF-8 ({error}); convert it") from error
        if line.strip():
            yield line


if __name__ == "__main__":
    command_line.run(main)
