"""docs/tutorial.ipynb: its cells, run in their order with a short text and few steps."""

import json

import pytest
from processes import ROOT, run_python
from small_runs import write_corpus

CELLS = json.loads((ROOT / "docs" / "tutorial.ipynb").read_text(encoding="utf-8"))["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]


def test_no_outputs_are_stored():
    for cell in CELLS:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)


@pytest.mark.slow
@pytest.mark.oldest_python
def test_the_cells_run(tmp_path):
    write_corpus(tmp_path / "texts")
    small = {'SOURCE = "stdlib"': 'SOURCE = "texts"', "STEPS = 900": "STEPS = 3"}
    first = CODE[0]
    for usual, replacement in small.items():
        assert usual in first
        first = first.replace(usual, replacement)
    sizes = "config.model.num_layers, config.data.sequence_length = 1, 7\n"
    sizes += "config.train.eval_tokens, config.train.eval_every = 14, 2"
    train = next(number for number, code in enumerate(CODE) if "train(config" in code)
    cells = [first, *CODE[1:train], sizes, *CODE[train:]]
    end = "print(len(branches), [axes.get_title() for axes in plt.gcf().axes])"
    result = run_python("-c", "\n".join([*cells, end]), cwd=tmp_path, MPLBACKEND="agg")
    assert result.code == 0, result.errors
    assert result.output.endswith("3 ['layer 1, head 1']\n")
    assert "--- branch 3" in result.output
    assert result.output.count("half-lives in tokens") == 1
    assert (tmp_path / "prompt.state").exists()
    assert "largest difference of logits" in result.output
    assert (tmp_path / "shared_model" / "model.html").exists()
