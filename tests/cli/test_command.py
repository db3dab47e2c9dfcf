"""The command simplernn, in a checkout, and its completion in a bash."""

import re
import shutil
import subprocess

import pytest
from processes import ROOT, assert_refused, run_python

from simplernn_jax import __version__
from simplernn_jax.__main__ import COMMANDS

MODULE = ("-m", "simplernn_jax")


def test_without_arguments_and_help_list_the_commands():
    alone, shown = run_python(*MODULE), run_python(*MODULE, "--help")
    assert alone == shown
    assert (shown.code, shown.errors) == (0, "")
    scripts = [name for name in COMMANDS if (ROOT / "scripts" / f"{name}.py").is_file()]
    listed = re.findall(r"^  (\w+)  +\w.*$", shown.output, re.MULTILINE)
    assert listed == [*scripts, "completion"]


def test_every_script_is_a_command_or_one_for_the_project():
    scripts = {path.stem for path in (ROOT / "scripts").glob("*.py")}
    assert scripts - COMMANDS.keys() == {"bootstrap", "stress"}


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


@pytest.fixture
def folder(tmp_path):
    for name in ("runs", "my texts"):
        (tmp_path / name).mkdir()
    (tmp_path / "runs" / "base").mkdir()
    (tmp_path / "tiny_mine.py").write_text("")
    return tmp_path


def complete(script, folder, *words):
    """The completions of the last of `words`, as bash splits them."""
    done = subprocess.run(
        ["bash", "--norc", "-c", COMPLETE, "bash", str(script), "simplernn", *words],
        capture_output=True,
        text=True,
        check=True,
        cwd=folder,
        env={"PATH": "/nowhere", "HOME": str(folder / "runs")},
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
        (["benchmark", "s"], ["serve", "startup", "scaling", "sizes"]),
        (["evaluate", "--split", ""], ["validation", "train"]),
        (["evaluate", "--split=t"], ["--split=train"]),  # as zsh splits them
        (["train", "--config", "ti"], ["tiny", "tiny_mine.py"]),
        (["train", "--config=tin"], ["--config=tiny", "--config=tiny_mine.py"]),
        (["sample", "--workdir", "ru"], ["runs"]),
        (["sample", "--workdir", "=", "runs/"], ["runs/base"]),
        (["sample", "--workdir", "~/b"], ["{folder}/runs/base"]),
        (["train", "--config.data.source", "=", "my\\ t"], ["my texts"]),
        (["trian", "--w"], []),
    ],
)
def test_completions(script, folder, words, expected):
    found = complete(script, folder, *words)
    assert found == [word.format(folder=folder) for word in expected]


def test_every_flag_that_help_lists_is_offered(script, folder):
    for command in ("train", "serve", "explain"):
        shown = run_python("-m", "simplernn_jax", command, "--help").output
        flags = re.findall(r"^  --(?:\[no\])?([\w.]+)[:=]", shown, re.MULTILINE)
        assert len(flags) > 5
        assert {f"--{flag}" for flag in flags} <= set(complete(script, folder, command, "--"))


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
