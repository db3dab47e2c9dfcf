"""scripts/score.py in a process of its own."""

import json
import signal
import subprocess

import pytest
from processes import ROOT, assert_each_refused, run_scripts, start_python
from small_data import write
from small_runs import untrained_run

SCRIPT = ROOT / "scripts" / "score.py"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return untrained_run(tmp_path_factory.mktemp("scored"), block="parallel")


def test_prints_the_most_surprising_units_of_all_files_and_writes_a_page(workdir, tmp_path):
    (tmp_path / "empty").touch()
    write(tmp_path / "a\x1b", "\tfirst\r\nan é\n\nlast")
    write(tmp_path / "b", b"\xff\n")
    names = ["a\x1b", "empty", "b"]
    flags = [SCRIPT, "--workdir", workdir]
    every, ranked = run_scripts(
        [*flags, "--json", "--top=0", *names, "-"],
        [*flags, "--html=page.html", *names],
        cwd=tmp_path,
        stdin=b"\tfirst\r\n" + 33_000 * b"x",  # more than a block
    )
    *lines, again, long, rest = [json.loads(line) for line in every.output.splitlines()]
    places = [(x["file"], x["line"], x["text"]) for x in lines]
    in_first = [("a\x1b", 1, "\tfirst"), ("a\x1b", 2, "an é"), ("a\x1b", 4, "last")]
    assert places == [*in_first, ("b", 1, "\ufffd")]
    assert again == lines[0] | {"file": "-"}
    assert (long["line"], long["column"], rest["line"]) == (2, 1, 2)
    assert long["text"] + rest["text"] == 33_000 * "x"
    assert rest["column"] == len(long["text"]) + 1
    *found, total = ranked.output.splitlines()
    lines.sort(key=lambda x: -x["surprise"])
    for x, place, text, expected in zip(lines, *(found[n::3] for n in range(3)), strict=True):
        name = x["file"].replace("\x1b", " ")
        numbers = f"surprise {x['surprise']:.1f}, {x['bits']:.1f} bits"
        assert place == f"{name}:{x['line']}  {numbers}"
        assert text == f"    {x['text']}".replace("\t", " ")
        assert expected.startswith(f"    {' ' * x['at']}^ expected '")
    assert total.startswith("23 bytes, ")
    assert all(f"<h2>{name}</h2>" in (tmp_path / "page.html").read_text("utf-8") for name in names)


def test_follows_a_file_until_interrupted(workdir, tmp_path):
    log = write(tmp_path / "log", "a\n")
    flags = ("--workdir", workdir, "--follow", "--quantile=0", "--json", log)
    process = start_python(SCRIPT, *flags)

    def follow(mode, text):
        with log.open(mode) as file:
            file.write(f"{text}\n")
        found = json.loads(process.stdout.readline())
        assert (found["text"], type(found["expected"])) == (text, str)
        return found["line"]

    try:
        assert follow("a", "a line of many words, which is more than the other has") == 2
        assert follow("w", "another line of many words, in a truncated file") == 3
        log.rename(tmp_path / "log.1")
        assert follow("a", "the first line of another file after a rotation of logs") == 4
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, output) == (130, "")
    assert "Traceback" not in errors
    assert subprocess.run(["pgrep", "-f", f"tail .* {log}"], check=False).returncode == 1


def test_bad_input_is_one_line(workdir, tmp_path):
    write(tmp_path / "binary", b"a\0b")
    (tmp_path / "empty").touch()
    of = ["--workdir", workdir]
    assert_each_refused(
        SCRIPT,
        (of, "no file: name the files"),
        ([*of, "--mask=words", "x"], "mask"),
        ([*of, "--follow", "x", "y"], "--follow reads one file"),
        ([*of, "--follow", "--html=z", "x"], "--follow reads one file"),
        ([*of, "--follow", "--top=1", "x"], "--follow prints every surprising line"),
        ([*of, "--quantile=0.5", "x"], "--quantile needs --follow"),
        ([*of, "--html=no/z", "x"], "no/z: its folder does not exist"),
        ([*of, "missing"], "missing: no such file"),
        ([*of, "."], "not a regular file"),
        ([*of, "binary"], "binary: a binary file; score text"),
        cwd=tmp_path,
    )
    (result,) = run_scripts([SCRIPT, *of, "empty", "-"], cwd=tmp_path)
    assert (result.code, result.output) == (2, "")
    assert result.errors.splitlines()[-1] == "error: empty, -: empty; score a text"
