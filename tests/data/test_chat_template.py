"""Conversations as text: built-in and given templates, and which tokens are targets."""

import json
import pickle
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from corpus_files import read_all, records, talk, write
from damages import flip_bit
from processes import ROOT

from benchmarks.stress.fuzz import CHATML
from simplernn_jax.config import DataConfig
from simplernn_jax.data.batches import BatchSource, document_ends
from simplernn_jax.data.chat_template import ChatTemplate, TemplateError, load_template
from simplernn_jax.data.evaluation_batches import Contexts, context_batches, evaluation_batches
from simplernn_jax.data.token_store import prepare_corpus
from simplernn_jax.errors import UserError

ROLES = load_template("roles")


def cut(template, chat, *, only_assistant):
    (found,) = template.pieces([chat], only_assistant=only_assistant)
    assert not isinstance(found, TemplateError), found
    return found


def test_rendered_text():
    chat = talk(("hi", "yo"), ("2", None), system="S")
    assert ChatTemplate(ROLES).render(chat) == "\x01S\x04\x02hi\x04\x03yo\x04\x022\x04"


@pytest.mark.parametrize(("source", "end"), [(ROLES, "\x04"), (CHATML, "<|im_end|>\n")])
def test_targets_are_answers_and_their_ends(source, end):
    template = ChatTemplate(source)
    chat = talk(("hi", "yo"), ("2", "3"), ("bye", None), system="S")
    assert template.end_of_turn == end
    whole = template.render(chat, add_generation_prompt=True)
    assert whole == template.render(chat[:-1]) + template.render_next(chat[-1:])
    pieces = cut(template, chat, only_assistant=True)
    assert "".join(piece.text for piece in pieces) == template.render(chat)
    assert [piece.text for piece in pieces if piece.is_target] == ["yo" + end, "3" + end]
    assert all(piece.is_target for piece in cut(template, chat, only_assistant=False))
    unanswered = cut(template, chat[:2], only_assistant=True)
    assert unanswered
    assert not any(piece.is_target for piece in unanswered)


READS_FIRST = """
{%- if messages[0]['role'] != 'system' %}{{ 'default;' }}{% endif %}
{%- for one in messages %}{{ one['role'] + ':' + one['content'] + ';' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"""


@pytest.mark.parametrize("source", [ROLES, READS_FIRST])
def test_an_assistant_may_speak_first(source):
    template = ChatTemplate(source)
    chat = [{"role": "assistant", "content": "welcome"}, *talk(("hi", "yo"))]
    pieces = cut(template, chat, only_assistant=True)
    assert "".join(piece.text for piece in pieces) == template.render(chat)
    end = template.end_of_turn
    assert [piece.text for piece in pieces if piece.is_target] == ["welcome" + end, "yo" + end]


def test_long_messages_are_not_kept():
    template = ChatTemplate(ROLES)
    tracemalloc.start()
    for number in range(20):
        chat = talk(("hi", f"{number}" * 100_000))
        assert cut(template, chat, only_assistant=True)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 1_000_000


def test_text_cannot_pose_as_a_role():
    template = ChatTemplate(ROLES)
    for token in "\x01\x02\x03\x04":
        with pytest.raises(TemplateError, match="control characters"):
            template.render(talk((f"a{token}b", None)))


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("{{ messages", "unexpected end of template"),
        ("{{ messages[7].content }}", "no element 7"),
        ("{{ messages | length }}", "changes what the template renders"),
        ("{{ ''.__class__.__mro__ }}", "attribute '__class__' of 'str' object is unsafe"),
        ("{{ raise_exception('never') }}", "never"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "nothing ends"),
        ("{{ lipsum(10**6) }}", "'lipsum' is undefined"),
        ("{{ cycler(1) ~ joiner() }}", "'cycler' is undefined"),
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


def looped(body, start="'a'"):
    """A template that computes `body` from `x.a` 40 times."""
    return f"{{% set x = namespace(a={start}) %}}{{% for i in range(40) %}}{body}{{% endfor %}}"


TIME, MEMORY = "it takes more than 1 s of CPU time", "it uses too much memory"
EITHER = f"({TIME}|{MEMORY})"
"""On a slow machine, the time ends before the memory."""


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% for i in range(99999) %}{% if 5.5 in range(99999) %}{% endif %}{% endfor %}", TIME),
        ("{{ 9 ** 99999999 }}", TIME),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ 'a' * 10**10 }}", MEMORY),
        ("{{ [1] * 10**10 }}", MEMORY),
        ("{{ 'a' | center(10000000000) }}", MEMORY),
        ("{{ '{:>10000000000}'.format(1) }}", MEMORY),
        ("{{ '%10000000000d' % 1 }}", MEMORY),
        ("{% set a = 'a' * 99999 %}{{ a.replace('a', a) }}", EITHER),
        ("{% set a = range(99999) | list %}{% set b = [" + "a[1:]," * 3600 + "] %}", EITHER),
        (looped("{% set x.a = x.a ~ x.a %}"), EITHER),
        (looped("{% set a %}{{ x.a }}{{ x.a }}{% endset %}{% set x.a = a %}"), EITHER),
        ("{{ 'a' * 6 * 10**6 }}", "it renders too much text"),
        (f"{{{{ {'(' * 5000} }}}}", "RecursionError"),
        (f"{{{{ {'9' * 5000} }}}}", "ValueError"),
        (f"{'{% for i in x %}' * 30}{'{% endfor %}' * 30}", "SyntaxError"),
        (f"{'{% if 1 %}' * 150}{'{% endif %}' * 150}", "IndentationError"),
    ],
)
def test_templates_that_use_too_much(source, reason):
    honest = ChatTemplate(CHATML)
    tracemalloc.start()
    with pytest.raises(UserError, match=rf"chat template: {reason}.*; correct --config"):
        ChatTemplate(source + CHATML)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10_000_000
    assert honest.render(talk(("hi", None))) == "<|im_start|>user\nhi<|im_end|>\n"


def trapped(body):
    """A template that renders `body`, too, where a conversation ends with "trap"."""
    return f"{{% if messages[-1].content == 'trap' %}}{body}{{% endif %}}{CHATML}"


def test_conversations_rendered_together_have_errors_of_their_own():
    template = ChatTemplate(trapped("{{ 'a' * 10**10 }}"))
    chats = [talk(("hi", "yo")), talk(("x", "trap")), talk(("2", "3"))]
    first, second, third = template.pieces(chats, only_assistant=False)
    assert (first, third) == tuple(cut(template, chats[i], only_assistant=False) for i in (0, 2))
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
        expected = templates[number % 3].render(talk((f"{number}" * 9, None)))
        assert text == expected
        assert f"{number}" * 9 in text


def test_the_process_that_renders_ends_with_its_input():
    program = str(ROOT / "simplernn_jax" / "data" / "template_worker.py")
    request = json.dumps([CHATML, [[talk(("hi", None)), False]]]).encode()
    ended = subprocess.run(
        [sys.executable, program],
        input=b"%d\n%b" % (len(request), request),
        stdout=subprocess.PIPE,
        check=True,
    )
    answer = json.loads(ended.stdout.partition(b"\n")[2])
    assert answer == {"texts": ["<|im_start|>user\nhi<|im_end|>\n"]}


def test_a_template_can_be_sent_to_another_process():
    template = pickle.loads(pickle.dumps(ChatTemplate(CHATML)))
    assert template.render(talk(("hi", None))) == "<|im_start|>user\nhi<|im_end|>\n"


def test_long_conversations_are_within_the_limits():
    chat = talk(*[("question " * 50, "answer " * 50)] * 300)
    for source in (ROLES, CHATML):
        text = ChatTemplate(source).render(chat)
        assert text.count("answer") == 300 * 50
    assert ChatTemplate(CHATML).render(talk(("a" * 10**7, "b"))).count("a") > 10**7


def test_templates_come_from_files(tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_text(CHATML)
    assert load_template(str(path)) == CHATML
    assert load_template(CHATML) == CHATML
    with pytest.raises(UserError, match=r"data\.template=roels: No such file.* roles"):
        load_template("roels")
    with pytest.raises(UserError, match="null byte"):
        load_template("~\0")


@pytest.mark.parametrize(
    ("record", "text"),
    [
        (
            {
                "conversations": [
                    {"from": "system", "value": "S"},
                    {"from": "human", "value": "a"},
                    {"from": "gpt", "value": "b"},
                ]
            },
            "\x01S\x04\x02a\x04\x03b\x04",
        ),
        ({"conversations": talk(("a", "b")), "system": "S"}, "\x01S\x04\x02a\x04\x03b\x04"),
        ({"messages": [{"from": "human", "value": "a"}], "conversations": 3}, "\x02a\x04"),
        ({"instruction": "add", "input": "1 2", "output": "3"}, "\x02add\n1 2\x04\x033\x04"),
        (
            {
                "instruction": "c",
                "input": None,
                "output": "",
                "system": "S",
                "history": [["a", "b"]],
            },
            "\x01S\x04\x02a\x04\x03b\x04\x02c\x04\x03\x04",
        ),
    ],
)
def test_records_of_sharegpt_and_alpaca(tmp_path, record, text):
    path = write(tmp_path / "a.jsonl", records(record))
    assert [*read_all(path, template="roles").values()] == [text]


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        (
            {"prompt": "a", "output": "b"},
            "no field 'messages', 'conversations' or 'instruction' and 'output'; it has prompt, ",
        ),
        ({"conversations": [{"from": "tool", "value": "a"}]}, "role 'tool'; known are human, gpt"),
        ({"conversations": [{"from": ["a"], "value": "a"}]}, r"role \['a'\]"),
        ({"conversations": [{"from": "gpt", "value": 1}]}, "message 0 has no text as its value"),
        ({"instruction": "a", "output": None}, "field 'output' is of type NoneType, not text"),
        ({"instruction": "a", "input": ["b"], "output": ""}, "field 'input' is of type list"),
        ({"instruction": "a", "output": "b", "history": [["a"]]}, "'history' is not a list of pai"),
        ({"instruction": "a", "output": "b", "history": 3}, "'history' is not a list of pairs"),
        ({"instruction": "a", "output": "b", "system": 3}, "message 0 has no text"),
    ],
)
def test_malformed_records_of_sharegpt_and_alpaca(tmp_path, record, problem):
    path = write(tmp_path / "a.jsonl", records(record))
    with pytest.raises(UserError, match=rf"a\.jsonl:1: .*{problem}"):
        read_all(path, template="roles")
    with pytest.raises(UserError, match=r"a\.jsonl:1: no field 'talk'; it has"):
        read_all(path, template="roles", field="talk")


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("text", "not a list"),
        ([], "not a list"),
        (["a"], "message 0 is of type str"),
        ([{"role": "tool", "content": "a"}], "the role 'tool'; known are system, user, assistant"),
        ([{"role": "user", "content": 3}], "no text"),
        (talk(("\x04", None)), "control characters"),
        (talk(("a", "\ud83d")), "half a surrogate pair"),
    ],
)
def test_bad_conversations_are_named(tmp_path, value, problem):
    path = write(tmp_path / "a.jsonl", records({"messages": talk(("a", "b"))}, {"messages": value}))
    with pytest.raises(UserError, match=rf"a\.jsonl:2: .*{problem}"):
        read_all(path, template="roles")
    whole = read_all(path, template="roles", max_malformed_records=1)
    assert [*whole.values()] == ["\x02a\x04\x03b\x04"]


def test_invalid_characters_of_a_message_are_replaced(tmp_path):
    path = write(tmp_path / "a.jsonl", records({"messages": talk(("a", "\ud83d!"))}))
    (text,) = read_all(path, template="roles", encoding_errors="replace").values()
    assert text == "\x02a\x04\x03\ufffd!\x04"


@pytest.mark.parametrize("indent", [None, 1])
def test_conversations_come_as_a_json_array_too(tmp_path, indent):
    chats = [{"messages": talk(("a", "b"))}, {"messages": "no"}, {"messages": talk(("c", "d"))}]
    path = write(tmp_path / "a.json", json.dumps(chats, indent=indent))
    whole = read_all(path, template="roles", max_malformed_records=1)
    assert whole == {"a.json[0]": "\x02a\x04\x03b\x04", "a.json[2]": "\x02c\x04\x03d\x04"}
    with pytest.raises(UserError, match=r"a\.json\[1\]: messages are not a list"):
        read_all(path, template="roles")


def test_conversations_come_as_jsonl(tmp_path):
    path = write(tmp_path / "a.txt", "text")
    table = write(tmp_path / "a.csv", "messages")
    for source in (str(path), str(table), "stdlib", "tfds:x"):
        with pytest.raises(UserError, match="come as JSONL"):
            read_all(source, template="roles")


CHATS = [talk(("hi", "yo"), ("2+3", "five"), system="S"), talk(("é", "ö" * 9)), talk(("q", None))]


def prepared(tmp_path, **settings):
    path = tmp_path / "a.jsonl"
    if not path.exists():
        write(path, records(*({"messages": chat} for chat in CHATS)))
    config = DataConfig(source=str(path), template="roles", loss_mask="assistant", **settings)
    return prepare_corpus(config, 0, str(tmp_path / "tokens"), show_progress=False)


def test_targets_are_stored_and_predicted_once(tmp_path):
    corpus = prepared(tmp_path, validation_fraction=0.0, sequence_length=5, batch_size=2)
    split, tokenizer = corpus.train, corpus.tokenizer
    answers = b"yo\x04five\x04" + "ö".encode() * 9 + b"\x04"
    assert split.num_bytes == len(answers)
    assert split.num_predictions == len(answers) + 2  # an EOS after each answer that comes last
    expected = sorted([*answers, tokenizer.eos_id, tokenizer.eos_id])
    assert sorted(split.tokens[split.targets]) == expected
    data = DataConfig(mode="document", sequence_length=5, batch_size=2)
    source = BatchSource(split, data, 0, tokenizer.pad_id)
    steps = -(-sum(-(-(document_ends(split) - split.document_starts - 1) // 5)) // 2)
    batches = [source[index] for index in range(steps)]
    for found in (
        batches,
        list(evaluation_batches(split, 16, 2, tokenizer.pad_id)[0]),
        list(context_batches(split, Contexts(6, 4), 12, 2, tokenizer.pad_id)[0]),
    ):
        assert sorted(np.concatenate([b.targets[b.loss_mask] for b in found])) == expected
    for mode in ("window", "stream"):
        data = DataConfig(mode=mode, sequence_length=5, batch_size=2)
        batch = BatchSource(split, data, 0, tokenizer.pad_id)[0]
        assert set(batch.targets[batch.loss_mask]) <= set(expected)
        assert not batch.loss_mask.all()


def test_a_stored_corpus_keeps_its_targets(tmp_path):
    first = prepared(tmp_path, split="position", validation_fraction=0.4)
    second = prepared(tmp_path, split="position", validation_fraction=0.4)
    for ours, again in ((first.train, second.train), (first.validation, second.validation)):
        np.testing.assert_array_equal(ours.targets, again.targets)
        assert not ours.targets[0]
    targets = np.array(first.train.targets)
    (folder,) = (tmp_path / "tokens").iterdir()
    flip_bit(folder / "train.targets")
    third = prepared(tmp_path, split="position", validation_fraction=0.4)
    np.testing.assert_array_equal(third.train.targets, targets)
    assert third.content_hash == first.content_hash
