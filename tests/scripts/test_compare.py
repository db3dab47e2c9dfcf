"""scripts/compare.py on the files of runs, without training."""

import math
import re

from matplotlib.image import imread
from processes import ROOT, assert_each_refused, run_scripts
from small_runs import small_config

from simplernn_jax.config import to_json
from simplernn_jax.training.metrics import MetricsWriter

SCRIPT = ROOT / "scripts" / "compare.py"


def write_run(workdir, config=None, train=(), validation=(), **fields):
    """A workdir with one row per loss, a step and 14 tokens apart."""
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(to_json(config or small_config(**fields)))
    writer = MetricsWriter(str(workdir), 0)
    for step, loss in enumerate(train, 1):
        values = {"tokens": 14 * step, "seconds": 0.5 * step, "tokens_per_second": 28.0}
        writer.write(step, "train", loss=loss, **values)
    scored = [(step, "validation", loss, 7) for step, loss in enumerate(validation, 1)]
    if validation:
        scored.append((len(validation), "held_out", 0.5, 1_000))
    for step, kind, loss, predictions in scored:
        values = {"bits_per_byte": loss / math.log(2), "predictions": predictions}
        writer.write(step, kind, loss=loss, tokens=14 * step, **values)
    writer.close()
    return workdir


def compare(*arguments, **options):
    (result,) = run_scripts((SCRIPT, *map(str, arguments)), **options)
    assert result.code == 0, result.errors
    return result


def cells(output, name):
    """Cells of a row of a table."""
    (line,) = re.findall(rf"^ *{re.escape(name)} {{2,}}(.+)$", output, re.MULTILINE)
    return re.split(" {2,}", line)


def test_differences_metrics_and_curves(tmp_path):
    a = write_run(tmp_path / "a", train=[5.0, 4.0, 3.0], validation=[4.5, 3.5, 3.75])
    b = write_run(tmp_path / "b", learning_rate=0.5, hidden_dim=16, train=[5.0, math.nan])
    result = compare(a, b, "--out", tmp_path / "new" / "out")
    assert result.errors == ""
    configuration, metrics, _ = result.output.split("\n\n")
    assert configuration.splitlines()[0].split() == ["configuration", "a", "b"]
    assert cells(configuration, "optimizer.learning_rate")[1] == "0.5"
    assert cells(configuration, "model.hidden_dim") == ["8", "16"]
    assert configuration.count("\n") == 2
    expected = {
        "steps": ["3", "2"],
        "training tokens": ["42", "28"],
        "tokens/s": ["28", "28"],
        "training loss, last": ["3.0000", "not finite"],
        "validation loss, last": ["3.7500", "-"],
        "validation loss, best": ["3.5000", "-"],
        "at step": ["2", "-"],
        "predictions": ["7", "-"],
        "bits/byte, last": ["5.4101", "-"],
        "bits/byte, best": ["5.0494", "-"],
        "held-out text at the end, loss": ["0.5000", "-"],
        "bits/byte": ["0.7213", "-"],
    }
    assert {name: cells(metrics, name) for name in expected} == expected
    small, large = (int(text.replace(",", "")) for text in cells(metrics, "parameters"))
    assert 1.5 < large / small < 4
    assert f"curves: {tmp_path}/new/out/compare.png" in result.output
    assert imread(tmp_path / "new" / "out" / "compare.png").shape[2] == 4


def test_equal_configurations_three_runs_and_equal_names(tmp_path):
    runs = [write_run(tmp_path / name / "run", train=[2.0] * n) for n, name in enumerate("abc", 1)]
    result = compare(*runs, cwd=tmp_path)
    assert result.output.startswith("configuration: no differences\n")
    assert cells(result.output, "steps") == ["1", "2", "3"]
    assert cells(result.output, "metrics") == ["a/run", "b/run", "c/run"]
    assert (tmp_path / "compare.png").exists()


def test_wrong_arguments_are_one_line(tmp_path):
    run = write_run(tmp_path / "run", train=[2.0])
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken" / "compare.png").mkdir(parents=True)
    assert_each_refused(
        SCRIPT,
        ([], "name two or more runs: python scripts/compare.py"),
        ([str(run)], "name two or more runs"),
        ([str(run), "nowhere"], "/nowhere: no such folder; name the workdirs"),
        ([str(run), "empty"], "/empty/config.json: no such file"),
        ([str(run), str(run), "--out=taken"], "taken/compare.png: a folder; specify a file"),
        cwd=tmp_path,
    )
