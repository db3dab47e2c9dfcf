"""Exit codes, one-line errors, help and logs of the scripts."""

import textwrap
from collections.abc import Iterable
from pathlib import Path

import pytest
from processes import Result, assert_each_refused, assert_refused, run_scripts, start_python

from simplernn_jax.errors import MAX_MESSAGE, UserError, counted

SCRIPT = '''
"""Counts something."""

import logging as standard_logging
import os

from absl import flags, logging

from simplernn_jax.cli import command_line
from simplernn_jax.errors import UserError

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")
{definitions}

def main() -> int | None:
{body}

if __name__ == "__main__":
    command_line.run(main)
'''


def write_script(path: Path, body: str, definitions: str = "") -> Path:
    indented = textwrap.indent(textwrap.dedent(body), "    ")
    path.write_text(SCRIPT.format(body=indented, definitions=definitions))
    return path


def run_script(
    folder: Path, body: str, *commands: list[str], definitions: str = ""
) -> list[Result]:
    """Run the script for each list of arguments, or once without."""
    script = write_script(folder / "count.py", body, definitions)
    return run_scripts(*((script, *arguments) for arguments in commands or [[]]), cwd=folder)


def run_bodies(folder: Path, bodies: Iterable[str]) -> list[Result]:
    """Run a script of each body."""
    scripts = [write_script(folder / f"{n}.py", body) for n, body in enumerate(bodies)]
    return run_scripts(*((script,) for script in scripts), cwd=folder)


ENDS = {
    "return None": (0, []),
    "return 75": (75, []),
    "raise KeyboardInterrupt": (130, []),
    "return 1 // 0": (1, ["Traceback", "ZeroDivisionError"]),
    "os.close(999)": (1, ["Traceback"]),  # an OSError without a path
}


def test_exit_codes(tmp_path):
    for result, (code, parts) in zip(run_bodies(tmp_path, ENDS), ENDS.values(), strict=True):
        assert result.code == code
        assert all(part in result.errors for part in parts)
        assert bool(result.errors) == bool(parts)


ERRORS = {
    'raise UserError("a file:\\n  is empty; fill it")': "error: a file: is empty; fill it",
    'raise UserError("config.train.steps=0 is wrong")': "error: --config.train.steps=0 is wrong",
    'open("never/written")': "never/written: no such file or directory; create it, or",
    'raise OSError(28, "No space left on device")': "writing a file: no space left on device; free",
    "raise MemoryError": "not enough memory",
    'command_line.expand_path("gs://b/a", "out")': "--out=gs://b/a: a URL, not a path",
    'command_line.expand_path("~nobody-here/a", "out")': "--out=~nobody-here/a: no such user",
    'import pathlib; pathlib.Path("~nobody-here").expanduser()': "no such user",
}


def test_an_error_of_the_user_or_the_file_system_is_one_line(tmp_path):
    for result, part in zip(run_bodies(tmp_path, ERRORS), ERRORS.values(), strict=True):
        assert_refused(result, part)


def test_a_closed_pipe_ends_the_script_quietly(tmp_path):
    script = write_script(tmp_path / "count.py", "print('x' * 1_000_000)")
    process = start_python(script)
    process.stdout.read(3)
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait() == 141


WRONG_FLAGS = [
    ("--workdr=x", "--workdr: no such flag; did you mean '--workdir'? --help"),
    ("--workdir", "Missing value for flag --workdir"),
    ("--count=three", "flag --count=three: invalid literal for int()"),
    ("stray", "'stray': not a flag"),
    ("--flagfile=/dev/zero", "--flagfile: not supported"),
]


def test_wrong_flag_is_one_line(tmp_path):
    definitions = '_COUNT = flags.DEFINE_integer("count", 1, "How often.")'
    script = write_script(tmp_path / "count.py", "return 1", definitions)
    assert_each_refused(script, *(([flag], part) for flag, part in WRONG_FLAGS))


@pytest.mark.parametrize(
    ("script", "flag", "meant"),
    [
        ("train", "learnig-rate", "config.optimizer.learning_rate"),
        ("train", "epochs", "config.train.epochs"),
        ("train", "config.optimizer.lr", "config.optimizer.learning_rate"),
        ("sample", "n", "num_samples"),
        ("evaluate", "text_file", "source"),
        ("sample", "temp", "temperature"),
        ("sample", "v1", ""),
    ],
)
def test_a_flag_by_another_name_is_proposed_if_the_script_has_it(script, flag, meant):
    (result,) = run_scripts((f"scripts/{script}.py", f"--{flag}=3"))
    near = f"; did you mean '--{meant}'?" if meant else ";"
    assert_refused(result, f"error: --{flag}: no such flag{near} --help shows the flags")


def test_arguments_that_are_not_flags(tmp_path):
    definitions = '_NAMES = command_line.Arguments("NAME ...")'
    body = "print(_NAMES.value, _WORKDIR.value)"
    commands = ["ops", "--workdir=w", "lm"], ["--help"]
    result, shown = run_script(tmp_path, body, *commands, definitions=definitions)
    assert result.output == "['ops', 'lm'] w\n"
    assert "NAME ..." in shown.output


def test_help_shows_the_docstring_and_the_flags_of_the_script(tmp_path):
    flags = ["--help", "-h", "--helpfull"]
    for flag, result in zip(
        flags, run_script(tmp_path, "return 1", *([flag] for flag in flags)), strict=True
    ):
        assert (result.code, result.errors) == (0, "")
        assert "Counts something." in result.output
        assert "--workdir: Directory of the run." in result.output
        assert ("--verbosity" in result.output) == (flag == "--helpfull")


def test_logs_of_the_project_are_shown_and_those_of_libraries_from_warnings_up(tmp_path):
    body = """
    logging.info("saved %d", 7)
    logging.warning("set aside")
    library = compile("logging.info('chatter'); logging.warning('careful')", "/lib/x.py", "exec")
    exec(library)
    standard_logging.getLogger("lib").info("more chatter")
    """
    (result,) = run_script(tmp_path, body)
    assert result.errors == "saved 7\nwarning: set aside\nwarning: careful\n"


def test_control_characters_and_line_breaks_do_not_reach_the_terminal():
    assert str(UserError("a\x1b[31mb\n  c\x00")) == r"a\x1b[31mb c\x00"


def test_the_middle_of_a_long_message_is_left_out():
    text = str(UserError("where: " + "x" * 5_000_000 + "; do this"))
    assert text.startswith("where: xxx")
    assert text.endswith("xxx")
    assert len(text) <= MAX_MESSAGE + 5
    text = str(UserError("where: " + "x" * 5_000 + "; do this"))
    assert text.endswith("; do this")


def test_numbers_agree_with_their_nouns():
    counts = [counted(number, "token") for number in (0, 1, 2, 1000)]
    assert counts == ["0 tokens", "1 token", "2 tokens", "1,000 tokens"]
