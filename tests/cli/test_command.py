"""The command simplernn, in a checkout, and its completion in a bash."""

import re
import shutil
import subprocess

import pytest
from processes import assert_refused, run_python

from simplernn_jax import __version__
from simplernn_jax.__main__ import commands

MODULE = ("-m", "simplernn_jax")


def test_without_arguments_and_help_list_the_commands():
    alone, shown = run_python(*MODULE), run_python(*MODULE, "--help")
    assert alone == shown
    assert (shown.code, shown.errors) == (0, "")
    listed = re.findall(r"^  (\w+)  +[A-Z].*\.$", shown.output, re.MULTILINE)
    assert listed == [*commands(), "completion"]
    assert "train" in listed


def test_version():
    assert run_python(*MODULE, "--version").output == f"{__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["trian"], "'trian': no such command; did you mean 'train'?; simplernn --help"),
        (["--workdir=x"], "'--workdir=x': no such command; simplernn --help lists them"),
        (["completion"], "name your shell: simplernn completion bash, or zsh"),
        (["completion", "fish"], "'fish': no such shell"),
    ],
)
def test_a_wrong_command_is_one_line(arguments, part):
    assert_refused(run_python(*MODULE, *arguments), part)


def test_nothing_slow_is_imported_before_the_command_is_known():
    code = "import sys; sys.argv[1:] = ['--help']; from simplernn_jax.__main__ import main; main()"
    result = run_python("-c", f"{code}; print(*sys.modules)")
    modules = result.output.splitlines()[-1].split()
    assert "simplernn_jax.__main__" in modules
    assert not {"jax", "flax", "absl", "numpy", "importlib.metadata"} & set(modules)


def test_help_and_errors_name_the_command():
    shown = run_python(*MODULE, "train", "--help")
    assert "simplernn train --config base --workdir runs/base" in shown.output
    assert "usage: simplernn train [--flag=value ...]" in shown.output
    assert "python scripts/" not in shown.output
    refused = run_python(*MODULE, "benchmark")
    assert_refused(refused, "error: name a benchmark: simplernn benchmark ops|")


def test_a_configuration_goes_by_its_name_from_any_folder(tmp_path):
    (tmp_path / "tiny").mkdir()  # a folder of that name is not in the way
    flags = ["--config=tiny", "--config.model.num_layers=0"]
    result = run_python(*MODULE, "train", *flags, "--workdir=w", cwd=tmp_path)
    assert "num_layers" in result.errors


COMPLETE = """
source "$1"
shift
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
_simplernn
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    result = run_python("-m", "simplernn_jax", "completion", "bash")
    assert (result.code, result.errors) == (0, "")
    path = tmp_path_factory.mktemp("completion") / "simplernn"
    path.write_text(result.output)
    return path


def complete(script, *words):
    """The completions of the last of `words`, as bash splits them; none are names of files."""
    done = subprocess.run(
        ["bash", "--norc", "-c", COMPLETE, "bash", str(script), "simplernn", *words],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": "/nowhere"},
        executable=shutil.which("bash"),
    )
    assert done.stderr == ""
    return [line for line in done.stdout.splitlines() if line]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["tr"], ["train", "train_tokenizer"]),
        (["completion", ""], ["bash", "zsh"]),
        (["sample", "--top"], ["--top_k", "--top_p"]),
        (["launch_local", "2", "--workd"], ["--workdir"]),
        (["benchmark", "s"], ["serve", "startup", "scaling", "sizes", "scoring"]),
        (["evaluate", "--split", ""], ["validation", "train"]),
        (["evaluate", "--split", "=", "t"], ["train"]),
        (["train", "--config", "ti"], ["tiny"]),
        (["sample", "--workdir", "="], []),
        (["sample", "--workdir", "ru"], []),
        (["trian", "--w"], []),
    ],
)
def test_completions(script, words, expected):
    assert complete(script, *words) == expected


def test_every_flag_that_help_lists_is_offered(script):
    shown = run_python("-m", "simplernn_jax", "serve", "--help").output
    flags = re.findall(r"^  --(?:\[no\])?([\w.]+)[:=]", shown, re.MULTILINE)
    assert len(flags) > 5
    assert {f"--{flag}" for flag in flags} <= set(complete(script, "serve", "--"))


@pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh")
def test_zsh_accepts_its_script():
    result = run_python("-m", "simplernn_jax", "completion", "zsh")
    done = subprocess.run(
        ["zsh", "-f", "-c", f"{result.output}\nprint $_comps[simplernn]"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "_bash_complete" in done.stdout
