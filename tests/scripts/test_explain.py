"""scripts/explain.py in a process of its own."""

import json

import jax.numpy as jnp
from processes import ROOT, assert_each_refused, run_scripts
from small_runs import save_untrained, small_config, write_corpus

from benchmarks import serving
from simplernn_jax.models import LanguageModel


def explain(*arguments, stdin=""):
    (result,) = run_scripts(("scripts/explain.py", *arguments), stdin=stdin.encode())
    return result


def test_writes_a_page_its_pictures_and_its_numbers(tmp_path):
    config = small_config(
        "parallel",
        source=write_corpus(tmp_path / "text"),
        validation_fraction=0.3,
        num_layers=2,
        mixer="attention,simple_rnn",
        mixer_options={"context": 9},
    )
    save_untrained(config, tmp_path / "run")
    out = tmp_path / "new" / "folder"
    code, output, errors = explain(
        *("--workdir", tmp_path / "run", "--text_file", "-", "--out", out, "--token", 5),
        stdin="größer als",
    )
    assert code == 0
    assert errors.splitlines()[-1] == "plotting ..."  # and before that a line per stage
    lines = output.splitlines()
    assert lines[0].startswith("layer 1 (attention): the map reproduces softmax attention to ")
    assert lines[1].startswith("layer 2: the map reproduces the recurrence to ")
    assert float(lines[1].split()[8]) <= 1e-5
    assert lines[2].startswith("evaluated on the validation split of the run (documents: 2): ")
    assert lines[3:] == [f"page: {out / 'explain.html'}"]
    assert {path.name for path in out.iterdir()} == {
        *("explain.html", "explain.json", "map_layer_1.png", "map_layer_2.png", "half_lives.png"),
        *("loss_by_position.png", "contributions.png"),
    }
    assert "<h1>Explanation of “größer als”</h1>" in (out / "explain.html").read_text("utf-8")
    assert json.loads((out / "explain.json").read_text())["chosen"]["position"] == 5


def test_an_inexact_map_is_reported_and_exits_with_code_1(tmp_path, monkeypatch):
    class Diverged(LanguageModel):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            kernel = self.layers[0].mixer.cell.query_proj.kernel
            kernel[...] = jnp.full_like(kernel[...], jnp.nan)

    monkeypatch.setattr(serving, "LanguageModel", Diverged)
    save_untrained(small_config(source=write_corpus(tmp_path / "text")), tmp_path / "run")
    arguments = ("--workdir", tmp_path / "run", "--text", "größer als", "--out", tmp_path / "out")
    code, output, _ = explain(*arguments)
    assert code == 1
    assert output.splitlines()[0] == (
        "layer 1: the map reproduces the recurrence to nan (relative) and the layer's output to "
        "nan   exceeds the tolerance 1e-05"
    )
    assert (tmp_path / "out" / "explain.html").exists()


def test_bad_flags_are_one_line_and_exit_code_2():
    x_to_y = ["--workdir", "x", "--out", "y"]
    assert_each_refused(
        "scripts/explain.py",
        ([], "no --workdir"),
        (["--workdir", "x", "--text", "a"], "no --out"),
        (["--workdir", "x", "--out", "README.md", "--text", "a"], "README.md: file exists; "),
        (["--workdir", "x", "--out", "README.md/y", "--text", "a"], "README.md/y: not a directory"),
        (x_to_y, "no --text"),
        ([*x_to_y, "--text", "a", "--map_tokens", "5000"], "map_tokens"),
        (["--workdir", "nowhere", "--out", "scripts", "--text", "a"], "no checkpoint in"),
    )
    assert not (ROOT / "y").exists()
