"""scripts/sample.py on the workdir of a training run, and with wrong flags."""

import functools
import re

import pytest
from processes import assert_refused, run_python

sample = functools.partial(run_python, "scripts/sample.py")
CORPUS = "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. 漢字 😀\n"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    text = folder / "text.txt"
    text.write_text(CORPUS * 100, encoding="utf-8")
    code, _, errors = run_python(
        "scripts/train.py",
        "--config=configs/tiny.py",
        f"--config.data.source={text}",
        "--config.data.split=position",
        "--config.train.steps=2",
        f"--workdir={folder / 'work'}",
    )
    assert code == 0, errors
    return folder / "work"


def test_prompt_and_continuation_are_printed(workdir):
    settings = ["--workdir", workdir, "--max_new_tokens", 50, "--seed", 3]
    code, text, errors = sample(*settings, "--prompt", "größer")
    assert code == 0, errors
    assert text.startswith("größer")
    assert text.endswith("\n")
    assert len(text) > len("größer\n")
    # The same from standard input, on this machine or any other run.
    again = sample(*settings, "--prompt_file", "-", stdin="größer".encode())
    assert again[:2] == (0, text)


def test_a_prefix_is_prefilled_once_and_continues_in_several_ways(workdir, tmp_path):
    def generate(*arguments, saved=""):
        code, text, errors = sample("--workdir", workdir, "--seed", 3, *arguments)
        assert code == 0
        assert re.fullmatch(saved, errors), errors
        return text

    def generate_three(*arguments, saved=""):
        parts = re.split(r"--- (\d of \d) ---\n", generate(*arguments, saved=saved))
        assert parts[0::2][0] == ""
        assert parts[1::2] == ["1 of 3", "2 of 3", "3 of 3"]
        return parts[2::2]

    states = [tmp_path / "prefilled", tmp_path / "continued"]
    whole = generate("--prompt", "größer", "--max_new_tokens", 50)
    saved = r"{}: saved [\d,]+ bytes of decoder state, after {} prompt tokens and {} new tokens\n"
    text = generate(
        *("--prompt", "grö", "--max_new_tokens", 0, "--save_state", states[0]),
        saved=saved.format(states[0], 5, 0),
    )
    assert text == ""
    begun = generate_three(
        *("--load_state", states[0], "--prompt", "ßer", "--num_samples", 3),
        *("--max_new_tokens", 20, "--save_state", states[1]),
        saved=saved.format(states[1], 4, 60),
    )
    ended = generate_three("--load_state", states[1], "--max_new_tokens", 30)
    assert len({*begun}) == 3
    # Byte 20 may be inside a character, whose first part is given as U+FFFD.
    begin, end = "grö" + begun[0].removesuffix("\n").rstrip("\ufffd"), ended[0]
    assert begin.startswith("größer")
    assert whole.startswith(begin)
    assert whole.endswith(end)
    assert len("grö" + begun[0]) + len(end) > len(whole)


def test_a_file_that_is_no_state_is_refused(workdir):
    path = workdir / "metrics.jsonl"
    result = sample("--workdir", workdir, "--load_state", path)
    assert_refused(result, f"error: {path}: corrupted, or not a state (")


def test_more_samples_than_memory_holds_are_refused_before_any_output(workdir):
    result = sample("--workdir", workdir, "--prompt", "a", "--num_samples", 2 * 10**9)
    assert_refused(result, "error: generating needs at least ")


def test_without_a_prompt_a_document_begins(workdir):
    code, text, errors = sample("--workdir", workdir, "--max_new_tokens", 5)
    assert code == 0, errors
    assert text.endswith("\n")


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        ([], b"", "no --workdir"),
        (["--workdir", "nowhere"], b"", "nowhere"),
        (["--workdir", "x", "--temperature", "-1"], b"", "temperature"),
        (["--workdir", "x", "--top_k", "three"], b"", "top_k"),
        *((["--workdir", "x", "--top_p", p], b"", "top_p=") for p in ("0", "1.5", "nan")),
        (["--workdir", "x", "--num_samples", "0"], b"", "num_samples"),
        (["--workdir", "x", "--save_state", "no/folder"], b"", "--save_state=no/folder: cannot be"),
        (["--workdir", "x", "--save_state", "tests"], b"", "--save_state=tests: cannot be written"),
        (["--workdir", "x", "--save_state", "/dev/null"], b"", "cannot be written (not a regular"),
        (["--workdir", "x", "--prompt", "a", "--prompt_file", "b"], b"", "mutually exclusive"),
        (["--workdir", "x", "--prompt_file", "missing.txt"], b"", "missing.txt"),
        (["--workdir", "x", "--prompt_file", "-"], b"ab\xff", "invalid UTF-8 at byte 2"),
    ],
)
def test_bad_flags_are_one_line_and_exit_code_2(arguments, stdin, message):
    assert_refused(sample(*arguments, stdin=stdin), message)
