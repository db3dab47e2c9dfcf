"""Every code block of README.md and docs/*.md is executed with --all, or checked if it cannot run.

Commands run as written, in a folder whose configurations and texts are small and which has a
trained ``runs/base``; one that is on several pages runs once. An HTML comment before a block says
otherwise: ``<!-- not run: reason -->`` has only its scripts, flags, extras and imports checked,
``<!-- devices: N -->`` simulates N devices; ``<!-- file: NAME -->`` is written to a file, not run.
The cells of docs/tutorial.ipynb run with a short text and few steps.
"""

import ast
import dataclasses
import functools
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib

import pytest
import yaml
from markdown_it import MarkdownIt
from processes import ROOT, run_python, run_scripts
from small_runs import write_corpus

from simplernn_jax.__main__ import commands
from simplernn_jax.serving.app import OPERATIONS

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_CODE = {"math", "text", "{note}", "{eval-rst}", "{literalinclude}", "{toctree}"}
"""Fences that Sphinx renders."""
MARK = re.compile(r"<!-- (not run|devices|file): (.+?) -->", re.DOTALL)

SMALL = """

import sys

_get_config = get_config


def get_config():
    config = _get_config()
    mixers = [word for word in sys.argv if word.startswith("--config.model.mixer=")]
    config.model.num_layers = 1 + sum(word.count(",") for word in mixers)
    config.model.hidden_dim = config.model.key_dim = config.model.value_dim = 16
    config.model.num_heads, config.model.mlp_dim = 2, 32
    config.data.batch_size = 4
    config.data.sequence_length = 32
    if config.data.source == "stdlib":
        config.data.source = "my_texts/"
    config.optimizer = type(config.optimizer)()  # one compiled program for several runs
    if config.train.steps:
        config.train.steps = 2
    config.train.eval_tokens = 256
    config.train.sample_every = 0
    return config
"""
"""Appended to every configuration: the same run, in seconds."""

RECORDING_PYTHON = f"""#!/usr/bin/env bash
case "$1" in -*) exec {sys.executable} "$@" ;; esac
IFS=$'\\t'
echo "$*" >>commands
"""
"""Scripts run later, in forks of one process."""

SENTENCE = "The quick brown fox jumps over the lazy dog.\ndef main():\n    return 0\n"


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block of code."""

    page: str
    line: int
    language: str
    text: str
    not_run: str = ""
    devices: int = 0
    file: str = ""

    def __str__(self):
        return f"{self.page}:{self.line}"


def blocks_of(path):
    """List the blocks of a page; fail on one that this test would overlook."""
    blocks, marks = [], {}
    for token in MarkdownIt("commonmark").parse(path.read_text(encoding="utf-8")):
        where = f"{path.name}:{token.map[0] + 1}" if token.map else path.name
        assert token.type != "code_block", f"{where}: indented code; use a fence with a language"
        if token.type == "html_block":
            found = MARK.fullmatch(token.content.strip())
            assert found, f"{where}: not a mark of this test: {token.content}"
            marks = {found[1].replace(" ", "_"): found[2]}
        elif token.type == "fence":
            language = token.info.split()[0] if token.info else ""
            if language not in NOT_CODE:
                assert language in ("bash", "python", "yaml"), f"{where}: language {language!r}"
                marks["devices"] = int(marks.get("devices", 0))
                blocks.append(Block(path.name, token.map[0] + 1, language, token.content, **marks))
            marks = {}
        else:
            assert not marks, f"{where}: a mark without a block after it"
    return blocks


ALL_BLOCKS = [block for page in PAGES for block in blocks_of(page)]
RUN_PAGES = list(dict.fromkeys(block.page for block in ALL_BLOCKS if not block.not_run))


def test_readme_fits_on_a_page():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_relative_links_and_pictures_exist(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_source_files_in_sentences_exist(page):
    for path in re.findall(r"`([\w/]+/\w+\.(?:py|c|h|sh))`", page.read_text(encoding="utf-8")):
        assert (ROOT / path).exists() or (ROOT / "simplernn_jax" / path).exists(), path


def test_the_traces_name_what_their_files_define():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"`(\w+/[\w/]+\.py)`:(?: each| where)? `([\w.]+)`", page)
    assert len(named) >= 15
    for path, name in named:
        file = ROOT / path if (ROOT / path).exists() else ROOT / "simplernn_jax" / path
        text = file.read_text(encoding="utf-8")
        assert all(re.search(rf"(def|class) {part}\b", text) for part in name.split(".")), path


def test_every_page_is_in_the_table_of_contents():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    listed = {line for line in index.splitlines() if re.fullmatch(r"[a-z_]+", line)}
    pages = [*(ROOT / "docs").glob("*.md"), *(ROOT / "docs").glob("*.ipynb")]
    assert listed | {"index"} == {page.stem for page in pages}


def test_the_gallery_has_every_configuration():
    gallery = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## (\w+)$", gallery, re.MULTILINE)
    configurations = {path.stem for path in (ROOT / "configs").glob("*.py")}
    assert {*sections} == configurations
    rows = re.findall(r"^\| \[`(\w+)`\]\(#(\w+)\)", gallery, re.MULTILINE)
    assert rows == [(name, name) for name in sections]


@functools.cache
def help_of(name):
    """``--help`` of a script."""
    (result,) = run_scripts((f"scripts/{name}", "--help"))
    assert result.code == 0, result.errors
    return result.output


@pytest.mark.oldest_python
@pytest.mark.parametrize("block", [b for b in ALL_BLOCKS if b.not_run], ids=str)
def test_block_that_is_not_run_names_what_exists(block):
    assert len(block.not_run) > 5, "give a reason"
    if block.language == "python":
        check_imports(block.text)
        return
    text = block.text
    if block.language == "yaml":
        assert all(yaml.safe_load_all(text))
    subprocess.run(["bash", "-n"], input=text, text=True, check=block.language == "bash")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra in re.findall(r"'\.\[(\w+)\]'", text):
        assert extra in extras["optional-dependencies"]
    commands = re.sub(r"\\\n|\n\s+(?=--)", " ", text).splitlines()
    checked = sum(check_command(command) for command in commands)
    checked += sum(check_route(url) for url in re.findall(r"curl http://[\w.:]+(/\S+)", text))
    assert checked or "pip install" in text


@pytest.mark.oldest_python
@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_commands_in_sentences_and_tables_exist(page):
    start = r"(?:python|bash) scripts/|simplernn [a-z]"
    for command in re.findall(rf"`((?:{start})[^`]+)`", page.read_text("utf-8")):
        assert check_command(command.replace(" ...", ""))


def script_of(command):
    """The script of a command of `simplernn`."""
    name = command[1]
    return f"python scripts/{name}.py" if name in commands() else command[0]


def check_route(path):
    """Check that the server has a route of this path."""
    routes = [re.sub(r"{[\w:]+}", "[^/]+", route) for _, route, _ in OPERATIONS]
    assert any(re.fullmatch(route, path) for route in routes), path
    return True


def check_imports(code):
    """Run the imports of `code`."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            exec(compile(ast.Module([node], []), "<imports>", "exec"), {})


def check_command(command):
    """Check the script and the flags of one line; return whether there was a script."""
    command = re.sub(r"\bsimplernn +(\w+)", script_of, command)
    found = re.search(r"scripts/(\w+\.(?:py|sh))", command)
    if not found or command.startswith("#"):
        return False
    assert (ROOT / "scripts" / found[1]).is_file(), command
    script = "train.py" if found[1].startswith("launch_local.") else found[1]  # its flags
    if script.endswith(".sh"):
        return True
    rest = shlex.split(command[found.end() :], comments=True)
    names = list(itertools.takewhile(lambda word: not word.startswith("-"), rest))
    assert all(name in help_of(script) for name in names), command
    for word in rest:
        if word.startswith("-"):
            name = re.escape(word.lstrip("-").split("=")[0])
            assert re.search(rf"--?(\[no\])?{name}\b", help_of(script)), f"{command}: {word}"
    return True


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project with small configurations and texts, and a trained ``runs/base``."""
    root = tmp_path_factory.mktemp("project")
    for name in ("scripts", "simplernn_jax", "benchmarks"):
        (root / name).symlink_to(ROOT / name)
    (root / "configs").mkdir()
    for config in (ROOT / "configs").glob("*.py"):
        (root / "configs" / config.name).write_text(config.read_text() + SMALL)
    shutil.copy(ROOT / "pyproject.toml", root)
    write_texts(root)
    make_environment(root)
    run_shell(root, "python scripts/train.py --config configs/base.py --workdir runs/base")
    return root


def write_texts(root):
    texts = root / "my_texts"
    texts.mkdir()
    for number in range(4):
        (texts / f"{number}.txt").write_text(SENTENCE * 20)
    (root / "tinyshakespeare.txt").write_text("ROMEO:\n" + SENTENCE * 40)
    (root / "book.txt").write_text(SENTENCE * 8)
    for name in ("story.txt", "module.py", "system.log"):
        (root / name).write_text(SENTENCE * 2)
    record = '{"user": "", "bot": "The quick brown fox."}\n'
    (root / "dialogues.jsonl").write_text(record * 8)


def make_environment(root):
    """Make a ``.venv`` that counts as installed, whose Python writes down the scripts to run."""
    python = root / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(RECORDING_PYTHON)
    python.chmod(0o755)
    version = subprocess.check_output([sys.executable, "-VV"], text=True)
    stamp = f"{version}{root}\n{(root / 'pyproject.toml').read_text()}"
    (root / ".venv" / "installed-").write_text(stamp)


def run_shell(root, code, devices=0):
    """Run `code`, and then the scripts that it has started."""
    python = root / ".venv" / "bin"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", code],
        check=False,
        cwd=root,
        env=os.environ | {"PATH": f"{python}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=300,
        text=True,
    )
    assert done.returncode == 0, f"{code}\n{done.stdout}"
    if (root / "commands").exists():
        for command in (root / "commands").read_text().splitlines():
            run_once(root, command, devices)
        (root / "commands").unlink()


@functools.cache
def run_once(root, command, devices):
    """Run a script, however many pages do."""
    flags = os.environ["XLA_FLAGS"]
    if devices:
        flags += f" --xla_force_host_platform_device_count={devices}"
    (result,) = run_scripts(command.split("\t"), cwd=root, XLA_FLAGS=flags)
    assert result.code == 0, f"{command}\n{result.output}{result.errors}"


@pytest.mark.slow
@pytest.mark.oldest_python
@pytest.mark.parametrize("page", RUN_PAGES)
def test_blocks_run(page, project, monkeypatch):
    monkeypatch.chdir(project)
    names = {"__name__": "__main__"}
    for block in ALL_BLOCKS:
        if block.page != page or block.not_run:
            continue
        if block.file:
            (project / block.file).write_text(block.text)
        elif block.language == "python":
            # Lines are those of the page, for tracebacks.
            exec(compile("\n" * block.line + block.text, str(ROOT / page), "exec"), names)
        else:
            assert block.language == "bash", f"{block}: cannot be run; mark it"
            run_shell(project, block.text, block.devices)


CELLS = json.loads((ROOT / "docs" / "tutorial.ipynb").read_text(encoding="utf-8"))["cells"]
CELL_CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]


def test_no_outputs_are_stored():
    for cell in CELLS:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)


@pytest.mark.slow
@pytest.mark.oldest_python
def test_the_cells_run(tmp_path):
    write_corpus(tmp_path / "texts")
    small = {'SOURCE = "stdlib"': 'SOURCE = "texts"', "STEPS = 900": "STEPS = 3"}
    first = CELL_CODE[0]
    for usual, replacement in small.items():
        assert usual in first
        first = first.replace(usual, replacement)
    sizes = "config.model.num_layers, config.data.sequence_length = 1, 7\n"
    sizes += "config.train.eval_tokens, config.train.eval_every = 14, 2"
    train = next(number for number, code in enumerate(CELL_CODE) if "train(config" in code)
    cells = [first, *CELL_CODE[1:train], sizes, *CELL_CODE[train:]]
    end = "print(len(branches), [axes.get_title() for axes in plt.gcf().axes])"
    result = run_python("-c", "\n".join([*cells, end]), cwd=tmp_path, MPLBACKEND="agg")
    assert result.code == 0, result.errors
    assert result.output.endswith("3 ['layer 1, head 1']\n")
    assert "--- branch 3" in result.output
    assert result.output.count("half-lives in tokens") == 1
    assert (tmp_path / "prompt.state").exists()
    assert "largest difference of logits" in result.output
    assert (tmp_path / "shared_model" / "model.html").exists()
