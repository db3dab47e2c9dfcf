"""scripts/evaluate.py in a process of its own."""

import json
import lzma
import math
import re
import shutil

import pytest
from processes import ROOT, assert_each_refused, assert_refused, run_scripts
from small_runs import save_untrained, small_config, untrained_run, write_corpus


def evaluate(*commands, **options):
    """Results of the script for each list of flags."""
    script = ROOT / "scripts" / "evaluate.py"
    return run_scripts(*((script, *flags) for flags in commands), **options)


def number(name, output):
    (value,) = re.findall(rf"{re.escape(name)}:? +([\d.,]+)", output)
    return float(value.replace(",", ""))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder of a run, its corpus), whose text was moved from where the run read it."""
    folder = tmp_path_factory.mktemp("saved")
    config = small_config(source=write_corpus(folder / "text"), validation_fraction=0.3)
    corpus = save_untrained(config, folder / "run")
    (folder / "text").rename(folder / "moved")
    return folder, corpus


def test_scores_a_split_from_the_workdir_alone(saved):
    folder, corpus = saved
    results = evaluate(
        ["--workdir", "run", "--split", "validation"],
        ["--workdir", "run", "--split", "train"],
        ["--workdir", "run", "--window", 9, "--stride", 4],
        cwd=folder,
    )
    for result in results:
        assert (result.code, result.errors) == (0, "")
    for (_, output, _), split in zip(results[:2], (corpus.validation, corpus.train), strict=True):
        assert number("predictions", output) == split.num_predictions
        nats = number("nats/token", output)
        assert number("perplexity", output) == pytest.approx(math.exp(nats), rel=1e-3)
        bits = nats * split.num_predictions / math.log(2)
        assert number("bits/byte", output) == pytest.approx(bits / split.num_bytes, rel=1e-3)
        text = corpus.tokenizer.decode_bytes(split.tokens)
        assert len(text) == split.num_bytes
        compressed = lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)
        assert number("xz -9e", output) == pytest.approx(8 * len(compressed) / len(text), abs=1e-4)
        columns = {re.search(r"\S+( {2,})", line).end() for line in output.splitlines()}
        assert len(columns) == 1, output
    overlapping = results[2].output
    assert number("predictions", overlapping) == corpus.validation.num_predictions
    assert "zero, then 6 to 9 tokens of context" in overlapping
    assert "state carried within documents" in overlapping


def test_a_run_without_held_out_text_says_so(tmp_path):
    assert_refused(*evaluate(["--workdir", untrained_run(tmp_path)]), "has no held-out text")


def test_bad_flags_are_one_line_and_exit_code_2():
    assert_each_refused(
        "scripts/evaluate.py",
        ([], "no --workdir"),
        (["--workdir", "nowhere"], "nowhere"),
        (["--workdir", "x", "--split", "test"], "split"),
        (["--workdir", "x", "--checkpoint", "last"], "--checkpoint=last: specify best, newest or"),
        (["--workdir", "x", "--stride", "3"], "--stride=3 needs --window: pass it too"),
        (["--workdir", "x", "--window", "3", "--stride", "4"], "the stride must be at least 1"),
    )


def test_the_text_of_a_run_is_read_only_where_a_flag_names_it(saved, tmp_path):
    folder, _ = saved
    shutil.copytree(folder / "run", tmp_path / "run", ignore=shutil.ignore_patterns("tokens"))
    flags = ["--workdir", tmp_path / "run"]
    refusal, (code, output, _) = evaluate(flags, [*flags, "--corpus_source", folder / "moved"])
    assert_refused(refusal, "error: tokenized text in ")
    assert code == 0
    assert "nats/token" in output


def test_another_text_is_scored_as_a_whole(saved, tmp_path):
    folder, _ = saved
    other = write_corpus(tmp_path / "other", seed=5, documents=3)
    texts = [(tmp_path / "other" / f"{n}.txt").read_text(encoding="utf-8") for n in range(3)]
    records = [json.dumps({"text": text}) for text in texts]
    (tmp_path / "same.jsonl").write_text("\n".join(records), encoding="utf-8")
    (tmp_path / "temporary").mkdir()
    before = sorted((folder / "run").rglob("*"))
    sources = [other, tmp_path / "same.jsonl", other]
    flags = ["--workdir", "run", "--source"]
    results = evaluate(
        *([*flags, source] for source in sources[:2]),
        [*flags, other, "--window", 9, "--stride", 4],
        cwd=folder,
        TMPDIR=str(tmp_path / "temporary"),
    )
    num_bytes = sum(len(text.encode()) for text in texts)
    for (code, output, errors), source in zip(results, sources, strict=True):
        assert code == 0, errors
        assert re.search(rf"^ *text +{re.escape(str(source))}, 3 documents$", output, re.MULTILINE)
        assert f" {num_bytes + 6} tokens; {num_bytes} bytes scored\n" in output
        assert number("predictions", output) == num_bytes + 3
    assert len({number("nats/token", result.output) for result in results[:2]}) == 1
    assert "zero, then 6 to 9 tokens of context" in results[2].output
    assert sorted((folder / "run").rglob("*")) == before
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_text_that_is_missing_or_not_alone_is_rejected(saved, tmp_path):
    workdir = saved[0] / "run"
    assert_each_refused(
        "scripts/evaluate.py",
        (["--workdir", workdir, "--source", "no.txt"], "no.txt: no such file or folder"),
        (["--workdir", workdir, "--source", "a:0.5,b:0.5"], "a mixture, which only training takes"),
        (["--workdir", "x", "--source", "a", "--split", "train"], "--source and --split are mut"),
        cwd=ROOT,
    )
