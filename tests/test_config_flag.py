"""The flag --config and its overrides, in a process of its own."""

import os
from pathlib import Path

import pytest
from processes import Result, assert_refused, run_python

SCRIPT = '''
"""Prints a configuration."""

from simplernn_jax import command_line

_CONFIG = command_line.define_config_flag()


def main() -> None:
    config = _CONFIG.value
    print(config.train.steps, config.data.source, config.model.tie_embeddings)
    if set(config.model.mixers) != {"simple_rnn"}:
        print(config.model.mixers)


if __name__ == "__main__":
    command_line.run(main)
'''

CONFIG = """
from simplernn_jax.config import Config


def get_config():
    config = Config()
    config.train.steps = 7
    return config
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "show.py").write_text(SCRIPT)
    (tmp_path / "seven.py").write_text(CONFIG)
    return tmp_path


def show(folder: Path, *arguments: str) -> Result:
    return run_python("show.py", *arguments, cwd=folder)


def test_file_and_overrides_of_each_type(folder):
    assert show(folder, "--config=seven.py").output == "7 stdlib True\n"
    overrides = ["--config.train.steps=11", "--config.data.source", "a b.txt"]
    result = show(folder, "--config", "seven.py", *overrides, "--noconfig.model.tie_embeddings")
    assert result.output == "11 a b.txt False\n"


def test_mixers_from_a_list_in_a_file_and_from_the_command_line(folder):
    of_a_list = CONFIG.replace(
        "return", "config.model.mixer = ['simple_rnn', 'attention'] * 2; return"
    )
    (folder / "hybrid.py").write_text(of_a_list)
    mixers = ("simple_rnn", "attention")
    assert show(folder, "--config=hybrid.py").output.splitlines()[1] == str(mixers * 2)
    result = show(folder, "--config=hybrid.py", "--config.model.mixer=attention")
    assert result.output.splitlines()[1] == str(("attention",) * 4)
    override = "--config.model.mixer=attention,simple_rnn,simple_rnn,attention"
    result = show(folder, "--config=seven.py", override)
    assert result.output.splitlines()[1] == str(mixers[::-1] + mixers)


def test_a_configuration_imports_from_its_folder(folder):
    variant = "import seven\n\ndef get_config():\n    c = seven.get_config()\n"
    (folder / "variants").mkdir()
    (folder / "variants" / "seven.py").write_text(CONFIG.replace("7", "13"))
    (folder / "variants" / "other.py").write_text(
        variant + "    c.data.source = 'x'\n    return c\n"
    )
    assert show(folder, "--config=variants/other.py").output == "13 x True\n"


@pytest.mark.parametrize(
    ("override", "part"),
    [
        (
            "--config.train.stpes=5",
            "--config.train.stpes: no such field; did you mean 'train.steps'?",
        ),
        ("--config.trian.steps=5", "did you mean 'train.steps'?"),
        ("--config.train.batch_size=5", "did you mean 'data.batch_size'?"),
        ("--config.zzz=5", "--config.zzz: no such field; --help shows them all"),
        ("--config.optimizer=5", "--config.optimizer: a section; set one of optimizer.name"),
        ("--config.train.steps=x", "--config.train.steps=x: invalid literal for int()"),
        ("--config.train.steps=-5", "--config.train.steps=-5 is invalid"),
        ("--config.model.mixer=attention,rnn", "--config.model.mixer='rnn' is invalid"),
        ("--config.model.tie_embeddings=maybe", "--config.model.tie_embeddings=maybe"),
    ],
)
def test_wrong_override_is_one_line(folder, override, part):
    assert_refused(show(folder, "--config=seven.py", override), part)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("def get_config():\n    return 1 // 0\n", "line 2: ZeroDivisionError"),
        ("def get_config(:\n", "line 1: invalid syntax"),
        ("import no_such_module\n", "line 1: ModuleNotFoundError: No module named"),
        ("x = 1\n", "has no get_config()"),
        ("def get_config():\n    return 3\n", "returned int; return a Config"),
        ("def get_config():\n    pass\n", "returned NoneType; return a Config"),
        (CONFIG.replace("train.steps", "train.epochs").replace("7", "-1"), "train.epochs=-1"),
    ],
)
def test_wrong_file_is_one_line(folder, text, part):
    (folder / "wrong.py").write_text(text)
    assert_refused(show(folder, "--config=wrong.py"), part)


def test_a_missing_file(folder):
    assert_refused(show(folder, "--config=sevn.py"), "no such file; did you mean 'seven.py'?")
    assert_refused(show(folder, "--config=nowhere/x.py"), "--config=nowhere/x.py: no such file")


def test_missing_flag(folder):
    assert_refused(show(folder), "--config is missing; specify a file such as")
    assert_refused(show(folder, "--config.train.steps=5"), "--config is missing")


def test_help_lists_the_fields_without_a_configuration(folder):
    result = show(folder, "--help")
    assert result.code == 0
    assert "--config.data.source='stdlib'" in result.output


def test_file_of_the_project_is_found_from_another_folder(folder):
    assert show(folder, "--config=configs/tiny.py").output == "40 stdlib True\n"
    (folder / "configs").mkdir()
    (folder / "configs" / "tiny.py").write_text(CONFIG)
    assert show(folder, "--config=configs/tiny.py").output == "7 stdlib True\n"
    assert_refused(show(folder, "--config=configs/bsae.py"), "/configs/base.py'?")
    assert_refused(show(folder, "--config=tini.py"), "/configs/tiny.py'?")


def test_a_file_that_is_not_regular_is_one_line(folder):
    os.mkfifo(folder / "fifo.py")
    assert_refused(show(folder, "--config=fifo.py"), "--config=fifo.py: not a regular file")
    assert_refused(show(folder, "--config=/dev/zero"), "--config=/dev/zero: not a regular file")
    assert_refused(show(folder, "--config=."), "--config=.: not a regular file")
    (folder / "loop.py").symlink_to("loop.py")
    assert_refused(show(folder, "--config=loop.py"), "symbolic links")
    assert_refused(show(folder, "--config=" + "x" * 300), "name too long")
