"""scripts/sample.py on the workdir of a training run, and with wrong flags."""

import re

import pytest
from processes import assert_each_refused, run_scripts
from small_runs import save_untrained, small_config

CORPUS = "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. 漢字 😀\n"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    (folder / "text").mkdir()
    for number in range(3):
        (folder / "text" / f"{number}.txt").write_text(CORPUS, encoding="utf-8")
    save_untrained(small_config(source=str(folder / "text")), folder / "work")
    return folder / "work"


def samples(workdir, *commands):
    """Results of the script for each list of flags, with text on standard input."""
    flags = ("scripts/sample.py", "--workdir", workdir, "--seed", 3)
    return run_scripts(*((*flags, *command) for command in commands), stdin="größer".encode())


def test_prompt_and_continuation_are_printed(workdir):
    length = ["--max_new_tokens", 50]
    one, again, new = samples(
        workdir,
        [*length, "--prompt", "größer"],
        [*length, "--prompt_file", "-"],  # the same from standard input
        ["--max_new_tokens", 5],  # a document begins
    )
    assert one.code == 0, one.errors
    assert one.output.startswith("größer")
    assert one.output.endswith("\n")
    assert len(one.output) > len("größer\n")
    assert again[:2] == (0, one.output)
    assert new.code == 0, new.errors
    assert new.output.endswith("\n")


def test_a_prefix_is_prefilled_once_and_continues_in_several_ways(workdir, tmp_path):
    state, three = tmp_path / "prefilled", ["--num_samples", 3, "--max_new_tokens", 20]
    whole, prefix, rest = samples(
        workdir,
        ["--prompt", "größer", *three],
        ["--prompt", "grö", "--max_new_tokens", 0, "--save_state", state],
        ["--load_state", state, "--prompt", "ßer", *three],
    )
    assert [result.code for result in (whole, prefix, rest)] == [0, 0, 0]
    saved = r"{}: saved [\d,]+ bytes of decoder state, after 5 prompt tokens and 0 new tokens\n"
    assert re.fullmatch(saved.format(state), prefix.errors)
    assert prefix.output == ""
    headings = r"--- (\d of \d) ---\n"
    assert re.findall(headings, rest.output) == ["1 of 3", "2 of 3", "3 of 3"]
    texts = [text.removeprefix("größer") for text in re.split(headings, whole.output)[2::2]]
    assert len({*texts}) == 3
    assert [t.removeprefix("ßer") for t in re.split(headings, rest.output)[2::2]] == texts


def test_bad_flags_are_one_line_and_exit_code_2():
    assert_each_refused(
        "scripts/sample.py",
        ([], "no --workdir"),
        (["--workdir", "nowhere"], "nowhere"),
        (["--workdir", "x", "--temperature", "-1"], "temperature"),
        (
            ["--workdir", "x", "--save_state", "no/folder"],
            "no/folder: its folder does not exist; create",
        ),
        (["--workdir", "x", "--prompt", "a", "--prompt_file", "b"], "mutually exclusive"),
        (["--workdir", "x", "--prompt_file", "-"], "invalid UTF-8 at byte 2"),
        stdin=b"ab\xff",
    )
