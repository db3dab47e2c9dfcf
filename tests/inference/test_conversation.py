"""A conversation with a carried state, in the library and in scripts/chat.py."""

import json
import random

import chex
import jax
import numpy as np
import pytest
from processes import assert_each_refused, run_python, run_scripts
from small_runs import save_untrained_chat, untrained_run

from simplernn_jax import load_model
from simplernn_jax.data.chat_template import ChatTemplate
from simplernn_jax.errors import UserError
from simplernn_jax.inference import Conversation, generate_text, load_state

SETTINGS = {"max_new_tokens": 3000, "temperature": 1.0}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return save_untrained_chat(tmp_path_factory.mktemp("run"), block="parallel", num_layers=2)


@pytest.fixture
def loaded(workdir):
    model, tokenizer, config = load_model(str(workdir))
    return model, tokenizer, ChatTemplate(config.data.template)


def test_state_is_that_of_the_rendered_text(loaded):
    model, tokenizer, template = loaded
    conversation = Conversation(*loaded, system="be brief")
    said = [{"role": "system", "content": "be brief"}]
    for seed, question in enumerate(("hä?", "more", "")):
        pieces = []
        answer = conversation.ask(question, seed=seed, on_text=pieces.append, **SETTINGS)
        assert "".join(pieces) == answer
        assert template.end_of_turn not in answer
        said += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        text = generate_text(model, tokenizer, template.render(said), max_new_tokens=0)
        chex.assert_trees_all_close(
            jax.tree.leaves(conversation.state.layers),
            jax.tree.leaves(text.state.layers),
            rtol=1e-4,
            atol=1e-5,
        )
        assert text.state.recent.tolist() == conversation.state.recent.tolist()
    assert len(conversation.turns) == 3


def test_undo_and_fork(loaded):
    conversation = Conversation(*loaded)
    first = conversation.ask("x", max_new_tokens=9)
    fork = conversation.fork()
    second = conversation.ask("y", max_new_tokens=9)
    assert fork.ask("y", max_new_tokens=9) == second
    conversation.undo()
    assert len(conversation.turns) == 1
    assert conversation.ask("y", max_new_tokens=9) == second
    continued = Conversation(*loaded, state=fork.turns[0])
    assert continued.ask("y", max_new_tokens=9) == second
    conversation.undo()
    conversation.undo()
    assert conversation.state is None
    assert conversation.ask("x", max_new_tokens=9) == first
    with pytest.raises(UserError, match="control characters"):
        conversation.ask("\x01", max_new_tokens=9)


def test_what_cannot_be_a_conversation(loaded):
    model, tokenizer, _ = loaded
    with pytest.raises(UserError, match="this model has no chat template"):
        Conversation(model, tokenizer, None)
    two = generate_text(model, tokenizer, ["a", "b"], max_new_tokens=0).state
    with pytest.raises(UserError, match="state: 2 sequences"):
        Conversation(*loaded, state=two)
    with pytest.raises(UserError, match="state: str; pass the state that generate"):
        Conversation(*loaded, state="a")


def test_chat_script(workdir, tmp_path, loaded):
    lines = ["hi", "/fork here", "more", "/undo", f"/save {tmp_path / 's'}", "more", "/load here",
             "more", "/reset", f"/load {tmp_path / 's'}", "more", "", "/help", "/none", "/load",
             f"/save {tmp_path}",
             "\x02", "/reset", "hi"]  # fmt: skip
    script = ["scripts/chat.py", f"--workdir={workdir}", "--max_new_tokens=5"]
    ((code, output, errors),) = run_scripts(script, stdin="\n".join(lines).encode())
    assert code == 0, errors
    found = [line for line in output.splitlines() if line.startswith("(")]
    saved = f"(saved to {tmp_path / 's'}; /load {tmp_path / 's'} continues from there)"
    assert found == [*["(1 turn)"] * 2, saved, "(1 turn)", *["(0 turns)"] * 3]
    expected = Conversation(*loaded)
    answers = [expected.ask(text, max_new_tokens=5) for text in ("hi", "more")]
    assert output.count(answers[1]) >= 4
    assert output.endswith(f"(0 turns)\n{answers[0]}\n")  # not after the loaded state
    assert [line.partition(" ")[2][:20] for line in errors.splitlines()] == [
        "/none: no such comma",
        "/load: needs a name ",
        "[Errno 21] a folder:",
        "message: a message c",
    ]
    state = load_state(tmp_path / "s", *loaded[:2])
    np.testing.assert_array_equal(state.recent, expected.turns[0].recent)


def test_what_chat_cannot_use_is_refused(workdir, tmp_path):
    flag = f"--workdir={workdir}"
    assert_each_refused(
        "scripts/chat.py",
        ([flag, "--system=\udcff"], "system: ", "half a surrogate pair"),
        ([flag, "--system=\x02"], "system: ", "control characters"),
        ([f"--workdir={untrained_run(tmp_path)}"], "not trained on conversations"),
    )


CONVERSATIONS, QUESTIONS = 500, 50


@pytest.mark.slow
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
