"""Exit codes, one-line errors, help and logs of the scripts."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from processes import Result, assert_refused, run_python

from simplernn_jax import command_line
from simplernn_jax.errors import UserError

SCRIPT = '''
"""Counts something."""

import logging as standard_logging
import os

from absl import flags, logging

from simplernn_jax import command_line
from simplernn_jax.errors import UserError

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")
{definitions}

def main() -> int | None:
{body}

if __name__ == "__main__":
    command_line.run(main)
'''


def run_script(folder: Path, body: str, *arguments: str, definitions: str = "") -> Result:
    indented = textwrap.indent(textwrap.dedent(body), "    ")
    (folder / "count.py").write_text(SCRIPT.format(body=indented, definitions=definitions))
    return run_python("count.py", *arguments, cwd=folder)


@pytest.mark.parametrize(
    ("body", "code", "parts"),
    [
        ("return None", 0, []),
        ("return command_line.EXIT_INTERRUPTED", 75, []),
        ("raise KeyboardInterrupt", 130, []),
        ("return 1 // 0", 1, ["Traceback", "ZeroDivisionError"]),
        ("os.close(999)", 1, ["Traceback"]),  # an OSError without a path
    ],
)
def test_exit_codes(tmp_path, body, code, parts):
    result = run_script(tmp_path, body)
    assert result.code == code
    assert all(part in result.errors for part in parts)
    assert bool(result.errors) == bool(parts)


@pytest.mark.parametrize(
    ("body", "part"),
    [
        ('raise UserError("a file:\\n  is empty; fill it")', "error: a file: is empty; fill it"),
        ('raise PermissionError(13, "Permission denied", "/runs/x")', "/runs/x: permission denied"),
        ('os.makedirs("count.py" + os.sep)', "file exists; choose another path"),
        ('raise OSError(28, "No space left on device", "/runs/y")', "/runs/y: no space left"),
        ('open("x" * 999)', "file name too long; choose another path"),
        ('open("never/written")', "never/written: no such file or directory; create it or"),
        ('os.symlink("l", "l"); open("l")', "l: too many levels of symbolic links; choose another"),
        (
            'raise OSError(22, "not a regular file", "/runs/z")',
            "/runs/z: not a regular file; choose",
        ),
        ('raise OSError(6, "No such device or address", "/p")', "/p: no such device or address"),
        ("raise MemoryError", "not enough memory"),
        ('__import__("pathlib").Path("~nobody-x").expanduser()', "~: no such user"),
        ('command_line.expand_path("~nobody-x/a", "out")', "--out=~nobody-x/a: no such user"),
        ('command_line.expand_path("gs://b/a", "out")', "--out=gs://b/a: a URL, not a path"),
        (
            'os.mkdir("d"); os.chdir("d"); os.rmdir("../d"); os.getcwd()',
            "no such file or directory",
        ),
    ],
)
def test_an_error_of_the_user_or_the_file_system_is_one_line(tmp_path, body, part):
    assert_refused(run_script(tmp_path, body), part)


def test_current_folder_that_is_gone(tmp_path):
    run_script(tmp_path, "return 0")
    (tmp_path / "gone").mkdir()
    start = "import os, sys; os.rmdir('../gone'); os.execv(sys.argv[1], sys.argv[1:])"
    script = tmp_path / "count.py"
    result = run_python("-c", start, sys.executable, script, cwd=tmp_path / "gone")
    assert_refused(result, "error: the current folder was deleted; cd to another one")


def test_message_is_printable_and_bounded(tmp_path):
    result = run_script(tmp_path, 'raise UserError("a\\x1b[2Jb" + "x" * 9999)')
    assert_refused(result, "error: a\\x1b[2Jbx", " ... x")
    assert len(result.errors) < 450
    result = run_script(tmp_path, "return 0", "--workdr=\x1b[2J" + "y" * 9999)
    assert_refused(result, "no such flag")
    assert len(result.errors) < 450
    assert "\x1b" not in result.errors


@pytest.mark.parametrize("content", [None, "fifo", "folder"])
def test_text_of_a_file_that_is_not_a_regular_one(tmp_path, content):
    path = tmp_path / "text"
    if content == "fifo":
        os.mkfifo(path)
    elif content == "folder":
        path.mkdir()
    with pytest.raises(UserError, match=r"--prompt_file=.*text: .*; specify a readable file"):
        command_line.read_text(None, str(path), name="prompt")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the full device of Linux")
def test_full_disk_names_the_workdir(tmp_path):
    body = 'os.write(os.open("/dev/full", os.O_WRONLY), b"text")'
    result = run_script(tmp_path, body, "--workdir=runs/full")
    assert_refused(result, "runs/full: no space left on device; free some space")


def test_a_closed_pipe_ends_the_script_quietly(tmp_path):
    run_script(tmp_path, "print('x' * 1_000_000)")
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "count.py")], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(3)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 141


@pytest.mark.parametrize(
    ("argument", "part"),
    [
        ("--workdr=x", "--workdr: no such flag; did you mean 'workdir'?"),
        ("--workdir", "Missing value for flag --workdir"),
        ("--count=three", "--count=three: invalid literal for int()"),
        ("stray", "'stray': not a flag"),
    ],
)
def test_wrong_flag_is_one_line(tmp_path, argument, part):
    definitions = '_COUNT = flags.DEFINE_integer("count", 1, "How often.")'
    assert_refused(
        run_script(tmp_path, "return 1", argument, definitions=definitions), part, "--help"
    )


def test_arguments_that_are_not_flags(tmp_path):
    definitions = '_NAMES = command_line.define_arguments("NAME ...")'
    body = "print(_NAMES.value, _WORKDIR.value)"
    result = run_script(tmp_path, body, "ops", "--workdir=w", "lm", definitions=definitions)
    assert result.output == "['ops', 'lm'] w\n"
    assert "NAME ..." in run_script(tmp_path, body, "--help", definitions=definitions).output


@pytest.mark.parametrize("flag", ["--help", "-h", "--helpfull"])
def test_help_shows_the_docstring_and_the_flags_of_the_script(tmp_path, flag):
    result = run_script(tmp_path, "return 1", flag)
    assert (result.code, result.errors) == (0, "")
    assert "Counts something." in result.output
    assert "--workdir: Directory of the run." in result.output
    assert ("--verbosity" in result.output) == (flag == "--helpfull")


@pytest.mark.parametrize(
    ("script", "names"),
    [
        ("sample", ["checkpoint"]),
        ("evaluate", ["checkpoint", "cache_dir", "source"]),
        ("explain", ["checkpoint", "cache_dir", "source"]),
    ],
)
def test_help_shows_flags_that_scripts_share(script, names):
    shown = run_python(f"scripts/{script}.py", "--help").output
    assert all(f"\n  --{name}: " in shown for name in names)


def test_logs_of_the_project_are_shown_and_those_of_libraries_from_warnings_up(tmp_path):
    body = """
    logging.info("saved %d", 7)
    logging.warning("set aside")
    library = compile("logging.info('chatter'); logging.warning('careful')", "/lib/x.py", "exec")
    exec(library)
    standard_logging.getLogger("lib").info("more chatter")
    """
    result = run_script(tmp_path, body)
    assert result.errors == "saved 7\nwarning: set aside\nwarning: careful\n"
