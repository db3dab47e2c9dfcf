"""Write short conversations to train a chat model on: sums, words, and a number to remember.

    python scripts/make_conversations.py conversations.jsonl
    python scripts/train.py --config configs/chat.py --workdir runs/chat

Each line of the file is a conversation in OpenAI's form ({"messages": [...]}), a pure function of
the flags.
"""

import bootstrap

if __name__ == "__main__":
    bootstrap.start()

import json
import random
import shlex
from collections.abc import Iterator

from absl import flags

from simplernn_jax.cli import command_line
from simplernn_jax.errors import UserError, counted, format_bytes
from simplernn_jax.files import check_writable, write_file
from simplernn_jax.project import name_commands

_ARGUMENTS = command_line.Arguments("FILE")
_CONVERSATIONS = flags.DEFINE_integer("conversations", 2000, "Number of lines.", lower_bound=1)
_TURNS = flags.DEFINE_integer(
    "turns", 30, "Questions of a conversation, each with its answer.", lower_bound=1
)
_SEED = flags.DEFINE_integer("seed", 0, "Random seed.", lower_bound=0)

_DEFAULT_PATH = "conversations.jsonl"
"""Source of configs/chat.py."""
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def turns(draw: random.Random) -> Iterator[tuple[str, str]]:
    """Yield questions and their answers, without end."""
    remembered: int | None = None
    while True:
        kind = draw.choice(("sum", "spell", "remember", "recall"))
        a, b = draw.randrange(10), draw.randrange(10)
        if kind == "sum":
            yield f"what is {a}+{b}?", str(a + b)
        elif kind == "spell":
            yield f"spell {a}", _WORDS[a]
        elif kind == "recall" and remembered is not None:
            yield "what was it?", str(remembered)
        else:
            remembered = a
            yield f"remember {a}", "ok"


def main() -> None:
    """Write the conversations."""
    if len(_ARGUMENTS.value) != 1:
        raise UserError(f"name one file to write, such as {_DEFAULT_PATH}")
    (path,) = _ARGUMENTS.value
    check_writable(path)
    draw = random.Random(_SEED.value)
    lines = []
    for _ in range(_CONVERSATIONS.value):
        messages = []
        for _, (question, answer) in zip(range(_TURNS.value), turns(draw), strict=False):
            messages += [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
        lines.append(json.dumps({"messages": messages}) + "\n")
    content = "".join(lines).encode()
    write_file(path, content)
    source = "" if path == _DEFAULT_PATH else f" {shlex.quote(f'--config.data.source={path}')}"
    command = f"python scripts/train.py --config configs/chat.py --workdir runs/chat{source}"
    print(
        f"{path}: {counted(len(lines), 'conversation')} of {counted(_TURNS.value, 'turn')}, "
        f"{format_bytes(len(content))}\n"
        "A model that is trained on them can add two digits, spell a digit and recall a number, "
        f"and nothing else. Train it with:\n  {name_commands(command)}"
    )


if __name__ == "__main__":
    command_line.run(main)
