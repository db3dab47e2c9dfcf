"""The page of a run that has ended."""

import bz2
import html
import lzma
import re

from small_runs import small_config, stop_after, write_corpus

from simplernn_jax import load_model
from simplernn_jax.inference.state import model_fingerprint
from simplernn_jax.training.loop import train
from simplernn_jax.training.metrics import read_metrics
from simplernn_jax.training.preparation import open_saved_corpus
from simplernn_jax.training.report import text_pieces


def test_the_page_has_the_numbers_of_the_run(tmp_path, monkeypatch):
    workdir, prompt = tmp_path / "a <run>", 'ab<b>&"'
    source = write_corpus(tmp_path / "text", documents=20)
    fields = {"eval_every": 2, "sample_prompt": prompt, "sample_tokens": 5, "steps": 4}
    config = small_config(source=source, validation_fraction=0.3, **fields)
    monkeypatch.setattr("simplernn_jax.training.report.SAMPLES", 3)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        train(config, workdir)
    assert not (workdir / "report.html").exists()
    train(config, workdir)
    page = (workdir / "report.html").read_text("utf-8")
    assert "<script" not in page
    assert all(source.startswith("data:") for source in re.findall('(?:src|href)="([^"]*)', page))
    texts = [html.unescape(text) for text in re.split("<[^>]*>", page) if text.strip()]
    assert texts.count("a <run>") == 2
    assert texts.count(prompt) == 3
    (row,) = (row for row in read_metrics(str(workdir)) if row["kind"] == "held_out")
    corpus = open_saved_corpus(str(workdir))
    held_out, seen = (
        b"".join(text_pieces(x, corpus.tokenizer)) for x in (corpus.validation, corpus.train)
    )
    sizes = {
        "this model after step 4": row["bits_per_byte"] * len(held_out) / 8,
        "bzip2": len(bz2.compress(held_out)),
        "xz -9e": len(lzma.compress(held_out, preset=9 | lzma.PRESET_EXTREME)),
    }
    for name, size in sizes.items():
        assert texts[texts.index(name) + 1] == f"{8 * size / len(held_out):.4f}"
    assert texts.count("zstd -19") == 2
    assert texts.count(f"{len(seen):,}") == 1
    assert model_fingerprint(load_model(workdir, "newest")[0]) in texts
    assert f"--workdir '{workdir}' --config.train.steps=8" in texts[-1]
