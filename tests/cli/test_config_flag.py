"""The flag --config and its overrides, in a process of its own."""

from pathlib import Path

import pytest
from processes import assert_each_refused, run_scripts

from simplernn_jax.config import Config, DataConfig, TrainConfig, to_json

SCRIPT = '''
"""Prints a configuration."""

from simplernn_jax.cli import command_line
from simplernn_jax.cli.config_files import define_config_flag, read_config

define_config_flag()


def main() -> None:
    config = read_config()
    print(config.train.steps, config.data.source, config.model.tie_embeddings)
    if config.model.is_given("mixer_options"):
        print(config.model.mixer_options, "is given")


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


def show(folder: Path, *commands: list[str]) -> list[str]:
    """The output of each command line."""
    results = run_scripts(*(("show.py", *arguments) for arguments in commands), cwd=folder)
    assert all(result.code == 0 for result in results), results
    return [result.output for result in results]


def test_file_and_overrides_of_each_type(folder):
    overrides = ["--config.train.steps=11", "--config.data.source", "a b.txt"]
    assert show(
        folder,
        ["--config=seven.py"],
        ["--config", "seven.py", *overrides, "--noconfig.model.tie_embeddings"],
        ["--config=seven.py", "--config.model.mixer_options=method=scan"],
    ) == ["7 stdlib True\n", "11 a b.txt False\n", "7 stdlib True\n{'method': 'scan'} is given\n"]


def test_the_configuration_that_a_run_saved(folder):
    config = Config(train=TrainConfig(steps=7), data=DataConfig(source="x"))
    (folder / "config.json").write_text(to_json(config))
    (folder / "wrong.json").write_text(to_json(config).replace("seed", "sede"))
    (folder / "bytes.json").write_bytes(b"\xff")
    assert show(folder, ["--config=config.json", "--noconfig.model.tie_embeddings"]) == [
        "7 x False\n{} is given\n"
    ]
    assert_each_refused(
        "show.py",
        (["--config=wrong.json"], "--config=wrong.json: train.sede: no such field; did you"),
        (["--config=bytes.json"], "--config=bytes.json: configuration: invalid JSON"),
        cwd=folder,
    )


def test_none_leaves_a_choice_to_the_program(folder):
    (folder / "two.py").write_text(CONFIG.replace("steps = 7", "gradient_accumulation = 2"))
    flags = ["--config.train.steps=7", "--config.train.gradient_accumulation=none"]
    assert show(folder, ["--config=two.py", *flags]) == ["7 stdlib True\n"]
    assert_each_refused(
        "show.py",
        (["--config=seven.py", "--config.mesh.data=0"], "mesh.data=0 is invalid: expected at le"),
        (
            ["--config=seven.py", "--config.train.steps=none"],
            "--config.train.steps=none: invalid literal",
        ),
        cwd=folder,
    )


def test_a_configuration_imports_from_its_folder(folder):
    variant = "import seven\n\ndef get_config():\n    c = seven.get_config()\n"
    (folder / "variants").mkdir()
    (folder / "variants" / "seven.py").write_text(CONFIG.replace("7", "13"))
    (folder / "variants" / "other.py").write_text(
        variant + "    c.data.source = 'x'\n    return c\n"
    )
    assert show(folder, ["--config=variants/other.py"]) == ["13 x True\n"]


OVERRIDES = [
    ("train.stpes=5", "--config.train.stpes: no such flag; did you mean '--config.train.steps'?"),
    ("train.batch_size=5", "did you mean '--config.data.batch_size'?"),
    ("train.steps=x", "--config.train.steps=x: invalid literal for int()"),
    ("train.steps=-5", "--config.train.steps=-5 is invalid"),
    ("model.mixer=attention,rnn,attention,attention", "--config.model.mixer='rnn' is invalid"),
    (
        "model.mixer_options=method",
        "--config.model.mixer_options=method: 'method': expected name=value",
    ),
    ("model.tie_embeddings=maybe", "tie_embeddings=maybe: ('Non-boolean argument"),
]
FILES = [
    ("def get_config():\n    return 1 // 0\n", "line 2: ZeroDivisionError"),
    ("def get_config(:\n", "line 1: invalid syntax"),
    ("import no_such_module\n", "line 1: ModuleNotFoundError: No module named"),
    ("x = 1\n", "has no get_config()"),
    ("def get_config():\n    pass\n", "returned NoneType; return a Config"),
    (
        CONFIG.replace("steps", "stpes"),
        "line 7: AttributeError: TrainConfig.stpes: no such field; d",
    ),
    (CONFIG.replace("train.steps", "train.epochs").replace("7", "-1"), "train.epochs=-1"),
]


def test_what_is_wrong_is_one_line(folder):
    for number, (text, _) in enumerate(FILES):
        (folder / f"wrong_{number}.py").write_text(text)
    assert_each_refused(
        "show.py",
        *((["--config=seven.py", f"--config.{text}"], part) for text, part in OVERRIDES),
        *(([f"--config=wrong_{number}.py"], part) for number, (_, part) in enumerate(FILES)),
        (["--config=tini.py"], "--config=tini.py: no such file; did you mean 'tiny'?"),
        (
            ["--config=seven.py", "--config.train.minutes=1", "--config.train.eval_every=5"],
            "--config.train.eval_every: follows from --minutes; omit one of the two",
        ),
        (["--config.train.steps=5"], "--config is missing; specify a file such as"),
        (["--config=/dev/zero"], "--config=/dev/zero: no such file"),
        cwd=folder,
    )
