"""Conversations as text: built-in and given templates, and which tokens are targets."""

import json
import pickle
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from small_data import read_all, records, talk, write

from benchmarks.stress.fuzz import CHATML
from simplernn_jax.config import DataConfig
from simplernn_jax.data.batches import BatchSource, document_ends
from simplernn_jax.data.chat_template import ChatTemplate, TemplateError, load_template
from simplernn_jax.data.evaluation_batches import Contexts, context_batches, evaluation_batches
from simplernn_jax.data.token_store import prepare_corpus
from simplernn_jax.errors import UserError

ROLES = load_template("roles")


def cut(template, chat, *, only_assistant=True):
    (found,) = template.pieces([chat], only_assistant=only_assistant)
    assert not isinstance(found, TemplateError), found
    return found


def targets_of(pieces):
    return [piece.text for piece in pieces if piece.is_target]


def test_rendered_text():
    chat = talk(("hi", "yo"), ("2", None), system="S")
    template = pickle.loads(pickle.dumps(ChatTemplate(ROLES)))
    assert template.render(chat) == "\x01S\x04\x02hi\x04\x03yo\x04\x022\x04"
    for token in "\x01\x02\x03\x04":  # no text can pose as a role
        with pytest.raises(TemplateError, match="control characters"):
            template.render(talk((f"a{token}b", None)))


READS_FIRST = """
{%- if messages[0]['role'] != 'system' %}{{ 'default;' }}{% endif %}
{%- for one in messages %}{{ one['role'] + ':' + one['content'] + ';' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"""


@pytest.mark.parametrize("source", [ROLES, CHATML, READS_FIRST])
def test_targets_are_answers_and_their_ends(source):
    template = ChatTemplate(source)
    end = template.end_of_turn
    chat = talk(("hi", "yo"), ("2", "3"), ("bye", None), system="S")
    whole = template.render(chat, add_generation_prompt=True)
    assert whole == template.render(chat[:-1]) + template.render_next(chat[-1:])
    pieces = cut(template, chat)
    assert "".join(piece.text for piece in pieces) == template.render(chat)
    assert targets_of(pieces) == ["yo" + end, "3" + end]
    assert all(piece.is_target for piece in cut(template, chat, only_assistant=False))
    assert targets_of(cut(template, chat[:2])) == []
    assistant_first = [{"role": "assistant", "content": "welcome"}, *talk(("hi", "yo"))]
    pieces = cut(template, assistant_first)
    assert "".join(piece.text for piece in pieces) == template.render(assistant_first)
    assert targets_of(pieces) == ["welcome" + end, "yo" + end]


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("{{ messages", "unexpected end of template"),
        ("{{ messages | length }}", "changes what the template renders"),
        ("{{ ''.__class__.__mro__ }}", "attribute '__class__' of 'str' object is unsafe"),
        ("{{ raise_exception('never') }}", "never"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "nothing ends"),
        ("{{ strftime_now('%Y') }}", "'strftime_now' is undefined"),
    ],
)
def test_templates_that_cannot_be_used(source, problem):
    with pytest.raises(UserError, match=f"chat template: .*{problem}"):
        ChatTemplate(source)


def test_functions_of_templates_in_the_field():
    source = """\
{% set ns = namespace(system='') %}
{% for m in messages if m.role == 'system' %}
    {% set ns.system = m.content %}
    {% break %}
{% endfor %}
{{ bos_token ~ (dict(a=range(2) | list, b=ns.system) | tojson) }}
{% for m in messages if m.role != 'system' %}
{{ m.role }}:{{ m.content }};
{% endfor %}
{% if add_generation_prompt %}
assistant:
{%- endif %}"""
    text = ChatTemplate(source).render(talk(("<é>", None), system="<é>"))
    assert text == '{"a": [0, 1], "b": "<é>"}\nuser:<é>;\n'


TIME, MEMORY = "it takes more than 1 s of CPU time", "it uses too much memory"
EITHER = f"({TIME}|{MEMORY})"
"""On a slow machine, the time ends before the memory."""


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ 9 ** 99999999 }}", TIME),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ 'a' * 10**10 }}", MEMORY),
        ("{% set a = 'a' * 99999 %}{{ a.replace('a', a) }}", EITHER),
        ("{{ 'a' * 6 * 10**6 }}", "it renders too much text"),
        (f"{{{{ {'(' * 5000} }}}}", "RecursionError"),
    ],
)
def test_templates_that_use_too_much(source, reason):
    honest = ChatTemplate(CHATML)
    tracemalloc.start()
    with pytest.raises(UserError, match=rf"chat template: {reason}.*; correct config"):
        ChatTemplate(source + CHATML)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 40_000_000
    assert honest.render(talk(("hi", None))) == "<|im_start|>user\nhi<|im_end|>\n"


def trapped(body):
    """A template that renders `body`, too, where a conversation ends with "trap"."""
    return f"{{% if messages[-1].content == 'trap' %}}{body}{{% endif %}}{CHATML}"


def test_conversations_rendered_together_have_errors_of_their_own():
    template = ChatTemplate(trapped("{{ 'a' * 10**10 }}"))
    chats = [talk(("hi", "yo")), talk(("x", "trap")), talk(("2", "3"))]
    first, second, third = template.pieces(chats, only_assistant=True)
    assert (first, third) == tuple(cut(template, chats[i]) for i in (0, 2))
    assert isinstance(second, TemplateError)
    assert str(second) == MEMORY


def test_threads_share_the_process_that_renders():
    loops = "{% for i in range(99999) %}" * 2 + "{% endfor %}" * 2
    templates = [ChatTemplate(source) for source in (ROLES, CHATML, trapped(loops))]

    def render(number):
        template = templates[number % 3]
        if number == 8:
            with pytest.raises(TemplateError, match=TIME):
                template.render(talk(("trap", None)))
        return template.render(talk((f"{number}" * 9, None)))

    with ThreadPoolExecutor(4) as threads:
        texts = list(threads.map(render, range(60)))
    for number, text in enumerate(texts):
        assert text == templates[number % 3].render(talk((f"{number}" * 9, None)))
        assert f"{number}" * 9 in text


def test_long_conversations_are_within_the_limits():
    text = ChatTemplate(CHATML).render(talk(*[("question " * 50, "answer " * 50)] * 300))
    assert text.count("answer") == 300 * 50
    assert ChatTemplate(CHATML).render(talk(("a" * 10**7, "b"))).count("a") > 10**7


def test_templates_come_from_files(tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_text(CHATML)
    assert load_template(str(path)) == CHATML
    assert load_template(CHATML) == CHATML
    for spec, problem in (("roels", "roels: No such file.* roles"), ("~\0", "null byte")):
        with pytest.raises(UserError, match=problem):
            load_template(spec)


def test_records_of_sharegpt(tmp_path):
    chat = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    inside = {"conversations": [{"from": "system", "value": "S"}, *chat]}
    path = write(tmp_path / "a.jsonl", records(inside, {"conversations": chat, "system": "S"}))
    for field in ({}, {"field": "conversations"}):
        texts = read_all(path, template="roles", **field)
        assert [*texts.values()] == ["\x01S\x04\x02a\x04\x03b\x04"] * 2


def test_records_of_alpaca(tmp_path):
    whole = {"instruction": "add", "input": "1 2", "output": "3"}
    path = write(tmp_path / "a.jsonl", records(whole, {"instruction": "go", "output": ""}))
    texts = read_all(path, template="roles")
    assert [*texts.values()] == ["\x02add\n1 2\x04\x033\x04", "\x02go\x04\x03\x04"]


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"prompt": "a", "output": "b"}, "no field 'messages'; it has prompt, output: name the"),
        ({"messages": [{"from": "gpt", "value": 1}]}, "message 0 has no text"),
        ({"instruction": "a", "output": None}, "message 1 has no text"),
        ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, "field 'history' is not"),
        ({"messages": talk(("a", "b")), "system": 3}, "message 0 has no text"),
        ({"messages": "text"}, "not a list"),
        ({"messages": ["a"]}, "message 0 is of type str"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "message 0 has the role 'tool'"),
        ({"messages": talk(("\x04", None))}, "control characters"),
    ],
)
def test_bad_conversations_are_named(tmp_path, record, problem):
    path = write(tmp_path / "a.jsonl", records({"messages": talk(("a", "b"))}, record))
    with pytest.raises(UserError, match=rf"a\.jsonl:2: .*{problem}"):
        read_all(path, template="roles")
    whole = read_all(path, template="roles", max_malformed_records=1)
    assert [*whole.values()] == ["\x02a\x04\x03b\x04"]


def test_conversations_come_as_json(tmp_path):
    chats = [{"messages": talk(("a", "b"))}, {"messages": "no"}, {"messages": talk(("c", "d"))}]
    path = write(tmp_path / "a.json", json.dumps(chats))
    whole = read_all(path, template="roles", max_malformed_records=1)
    assert whole == {"a.json[0]": "\x02a\x04\x03b\x04", "a.json[2]": "\x02c\x04\x03d\x04"}
    table = write(tmp_path / "a.csv", "messages")
    for source in (str(table), "stdlib"):
        with pytest.raises(UserError, match="come as JSONL"):
            read_all(source, template="roles")


CHATS = [talk(("hi", "yo"), ("2+3", "five"), system="S"), talk(("é", "ö" * 9)), talk(("q", None))]


def prepared(tmp_path, **settings):
    path = write(tmp_path / "a.jsonl", records(*({"messages": chat} for chat in CHATS)))
    config = DataConfig(source=str(path), template="roles", loss_mask="assistant", **settings)
    return prepare_corpus(config, 0, str(tmp_path / "tokens"))


def test_targets_are_stored_and_predicted_once(tmp_path):
    corpus = prepared(tmp_path, validation_fraction=0.0)
    split, tokenizer = corpus.train, corpus.tokenizer
    answers = b"yo\x04five\x04" + "ö".encode() * 9 + b"\x04"
    assert split.num_bytes == len(answers)
    assert split.num_predictions == len(answers) + 2  # an EOS after each answer that comes last
    expected = sorted([*answers, tokenizer.eos_id, tokenizer.eos_id])
    assert sorted(split.tokens[split.targets]) == expected
    data = DataConfig(mode="document", sequence_length=5, batch_size=2)
    source = BatchSource(split, data, 0, tokenizer.pad_id)
    steps = -(-sum(-(-(document_ends(split) - split.document_starts - 1) // 5)) // 2)
    for found in (
        [source[index] for index in range(steps)],
        list(evaluation_batches(split, 16, 2, tokenizer.pad_id)),
        list(context_batches(split, Contexts(6, 4), 12, 2, tokenizer.pad_id)),
    ):
        assert sorted(np.concatenate([b.targets[b.loss_mask] for b in found])) == expected
    for mode in ("window", "stream"):
        data = DataConfig(mode=mode, sequence_length=5, batch_size=2)
        batch = BatchSource(split, data, 0, tokenizer.pad_id)[0]
        assert set(batch.targets[batch.loss_mask]) <= set(expected)
        assert not batch.loss_mask.all()


def test_a_position_split_divides_targets(tmp_path):
    corpus = prepared(tmp_path, split="position", validation_fraction=0.4)
    whole = prepared(tmp_path, split="position", validation_fraction=0.0).train
    parts = [corpus.train, corpus.validation]
    assert not any(part.targets[0] for part in parts)
    expected = np.array(whole.targets)
    expected[len(corpus.train.tokens)] = False
    np.testing.assert_array_equal(np.concatenate([part.targets for part in parts]), expected)
