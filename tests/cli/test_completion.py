"""Shell completion: the function of bash, in a bash of its own."""

import re
import shutil
import subprocess

import pytest
from processes import run_python

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
        (
            ["train", "--config.optimizer.beta"],
            ["--config.optimizer.beta1", "--config.optimizer.beta2"],
        ),
        (["train", "--nodis"], ["--nodistributed"]),
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
        (["sample", "--top_k", ""], ["my texts", "runs", "tiny_mine.py"]),
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
