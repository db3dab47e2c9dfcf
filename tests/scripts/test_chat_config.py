"""configs/chat.py on the conversations of scripts/make_conversations.py, asked over 50 turns."""

import json
import random

import pytest
from processes import run_python, run_scripts

pytestmark = pytest.mark.slow

CONVERSATIONS, QUESTIONS = 500, 50


@pytest.mark.oldest_python
def test_a_trained_model_answers_over_fifty_turns(tmp_path):
    path = tmp_path / "conversations.jsonl"
    made = run_python("scripts/make_conversations.py", path, f"--conversations={CONVERSATIONS}")
    assert made.code == 0, made.errors
    assert made.output.startswith(f"{path}: 500 conversations of 30 turns, ")
    assert made.output.endswith(f"--workdir runs/chat --config.data.source={path}\n")
    command = (
        *("scripts/train.py", "--config=configs/chat.py", f"--workdir={tmp_path / 'run'}"),
        *(f"--config.data.source={path}", "--config.train.steps=200"),
        "--config.train.eval_every=0",
    )
    (trained,) = run_scripts(command, XLA_FLAGS="")  # optimized code, unlike that of other tests
    assert trained.code == 0, trained.errors
    # A conversation that was not trained on: of another seed.
    run_python(
        *("scripts/make_conversations.py", tmp_path / "new.jsonl", "--conversations=1"),
        *(f"--turns={QUESTIONS}", f"--seed={random.Random(0).randrange(1, 10**6)}"),
    )
    (line,) = (tmp_path / "new.jsonl").read_text().splitlines()
    contents = [message["content"] for message in json.loads(line)["messages"]]
    asked = "\n".join(contents[::2]).encode()
    chat = ("scripts/chat.py", f"--workdir={tmp_path / 'run'}")
    (answered,) = run_scripts(chat, stdin=asked)
    assert answered.code == 0, answered.errors
    answers = answered.output.splitlines()
    right = sum(a == b for a, b in zip(answers, contents[1::2], strict=True))
    assert right >= QUESTIONS - 1, list(zip(contents[::2], answers, strict=True))
