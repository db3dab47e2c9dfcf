"""Whole runs: their end, their bit-exact resumption, and how they stop."""

import dataclasses
import json
import math
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from processes import ROOT, assert_refused, run_scripts, start_python
from small_data import records, talk, write
from small_runs import newest_checkpoint, small_config, stop_after, write_corpus

from simplernn_jax import load_model
from simplernn_jax.checkpoint.folder import CheckpointFolder, read_quality
from simplernn_jax.config import MeshConfig
from simplernn_jax.data.chat_template import ChatTemplate, load_template
from simplernn_jax.errors import UserError
from simplernn_jax.inference import generate_text
from simplernn_jax.inference.state import model_fingerprint
from simplernn_jax.training import loop
from simplernn_jax.training.loop import deferred_signals, train
from simplernn_jax.training.metrics import read_metrics
from simplernn_jax.training.preparation import open_saved_corpus

HYBRID = {"num_layers": 2, "mixer": "attention,simple_rnn", "mixer_options": {"context": 10}}
"""An attention context longer than the sequences of `small_config`."""
EVERYTHING = {"dropout": 0.1, "reset_probability": 0.2, "name": "muon", "gradient_accumulation": 2}


@pytest.mark.parametrize(
    ("mode", "block", "fields"),
    [
        ("window", "plain", {"validation_fraction": 0.2, "eval_every": 5}),
        ("stream", "parallel", HYBRID | EVERYTHING),
    ],
)
def test_resume_is_bit_exact(tmp_path, monkeypatch, mode, block, fields):
    source = write_corpus(tmp_path / "text")
    if mode == "window":
        source += f":2,{write_corpus(tmp_path / 'other', seed=1)}:1"  # a mixture
    fields = fields | {"mode": mode, "steps": 20, "save_every": 6, "log_every": 3}
    config = small_config(block, source=source, **fields)
    whole = train(config, str(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        stop_after(patch, 8)
        first = train(config, str(tmp_path / "parts"))
    assert (first.step, first.interrupted_by, first.evaluation) == (8, "SIGTERM", None)
    assert newest_checkpoint(tmp_path / "parts")["number of steps"] == 8
    second = train(config, str(tmp_path / "parts"))
    assert (second.step, second.interrupted_by) == (20, None)
    assert second.evaluation == whole.evaluation
    expected = newest_checkpoint(tmp_path / "whole")
    assert expected["number of steps"] == 20
    assert newest_checkpoint(tmp_path / "parts") == expected
    kinds = {name.split("/")[0] for name in expected}
    assert {"params", "opt_state", "rng"} <= kinds
    assert ("carried" in kinds) == (mode == "stream")
    # The same rows in the same order, none twice, although one is the mean of steps 7 to 9.
    names = ("step", "kind", "loss", "tokens", "gradient_norm", "learning_rate", "skipped_updates")
    whole, parts = (
        [[row.get(name) for name in names] for row in read_metrics(str(tmp_path / folder))]
        for folder in ("whole", "parts")
    )
    assert whole == parts
    assert [row[0] for row in whole if row[1] == "train"] == [*range(3, 20, 3), 20]


@pytest.mark.oldest_python
def test_a_run_resumes_with_another_number_of_stages(tmp_path, monkeypatch):
    """Checkpoints hold single layers."""
    config = small_config(
        source=write_corpus(tmp_path / "text"),
        **{"num_layers": 2, "sequence_length": 8, "batch_size": 4, "mode": "stream"},
        **{"name": "muon", "steps": 7, "log_every": 1, "validation_fraction": 0.2},
    )

    def run(workdir, last_step, **sizes):
        config.mesh = MeshConfig(**({"data": 1} | sizes))
        with monkeypatch.context() as patch:
            display = stop_after(patch, last_step)
            return train(config, str(workdir)), " ".join(display.lines)

    one, two = tmp_path / "one", tmp_path / "two"
    run(one, 3)
    shutil.copytree(one, two)
    on_one, _ = run(one, 9)
    on_two, printed = run(two, 9, pipeline=2, data=2)
    assert "at step 3 of 7" in printed
    assert on_two.step == on_one.step == 7
    back, _ = run(two, 9)  # all steps are done: it only evaluates
    predictions = {result.evaluation.predictions for result in (on_one, on_two, back)}
    assert len(predictions) == 1
    assert back.evaluation.nats_per_token == pytest.approx(on_two.evaluation.nats_per_token)
    losses = [
        [row["loss"] for row in read_metrics(str(workdir))] + [result.evaluation.nats_per_token]
        for workdir, result in ((one, on_one), (two, on_two))
    ]
    # With AMX, Muon rounds operands to bfloat16, which amplifies differences of float32 sums.
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    found, expected = newest_checkpoint(two), newest_checkpoint(one)
    assert list(found) == list(expected)
    names = [name for name in expected if name.startswith(("params", "opt_state", "carried"))]
    assert any("layers/1/" in name for name in names)
    values = [
        np.concatenate([np.frombuffer(saved[name][2], saved[name][0]) for name in names])
        for saved in (found, expected)
    ]
    assert np.linalg.norm(values[0] - values[1]) < 1e-4 * np.linalg.norm(values[1])


def with_train(config, **fields):
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **fields))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run: its configuration and its folder."""
    folder = tmp_path_factory.mktemp("finished")
    config = small_config(
        source=write_corpus(folder / "text"), validation_fraction=0.2, steps=5, log_every=2
    )
    train(config, str(folder / "run"))
    return config, folder / "run"


def test_a_finished_run_leaves_its_files(finished):
    _, workdir = finished
    assert (workdir / "loss_curve.png").stat().st_size > 1000
    assert json.loads((workdir / "config.json").read_text())["train"]["steps"] == 5
    rows = read_metrics(str(workdir))
    assert [(row["step"], row["kind"]) for row in rows] == [
        (2, "train"),
        (4, "train"),
        (5, "train"),
        (5, "held_out"),
    ]
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert rows[2]["tokens"] == rows[3]["tokens"] == 68  # two reach into the next document
    rates = [row["learning_rate"] for row in rows if row["kind"] == "train"]
    assert rates[0] == pytest.approx(2e-3 * (1 / 3 + (1 - 1 / 3) / 3))  # second of 3 to warm up
    assert open_saved_corpus(str(workdir)).validation is not None


def test_resuming_a_finished_run_changes_nothing(finished, capsys):
    config, workdir = finished
    before, rows = newest_checkpoint(workdir), read_metrics(str(workdir))
    result = train(config, workdir)
    assert (result.step, result.interrupted_by) == (5, None)
    assert load_model(workdir)[2].train.steps == 5  # a pathlib.Path, too
    assert result.evaluation is not None
    assert result.evaluation.nats_per_token == rows[-1]["loss"]
    assert newest_checkpoint(workdir) == before
    assert read_metrics(str(workdir)) == rows
    output = capsys.readouterr().out
    assert "all steps are done" in output
    assert "not clearly better than uniform guessing" in output
    assert "first step" not in output
    train(with_train(config, steps=3), workdir)  # "all steps are done": it keeps its configuration
    assert json.loads((workdir / "config.json").read_text())["train"]["steps"] == 5


def test_a_workdir_alone_resumes_its_run_from_any_folder(finished, tmp_path):
    _, workdir = finished
    before, moved = newest_checkpoint(workdir), tmp_path / "moved"
    shutil.copytree(workdir, moved)
    script, new = ROOT / "scripts" / "train.py", ("--config=tiny", "--config.train.steps=6")
    own, longer, refused, other, none = run_scripts(
        (script, "--workdir", moved.name),
        (script, "--workdir=moved", "--config.train.steps=6"),
        (script, "--workdir=moved", "--config.model.hidden_dim=9"),
        (script, "--workdir=moved", *new),
        (script, "--workdir=new"),
        cwd=tmp_path,
    )
    assert (own.code, newest_checkpoint(moved)["number of steps"]) == (0, 6)
    told = "the configuration of this run: moved/config.json\n"
    assert own.errors.count(told) == longer.errors.count(told) == 1
    assert "checkpoint has" not in own.output
    assert "all steps are done" in own.output
    assert "config.train.steps is 6, checkpoint has 5" in longer.output
    assert newest_checkpoint(workdir) == before
    assert refused.code == 2
    settings = "error: the checkpoint has different settings: --config."
    assert f"{settings}model.hidden_dim is 9, checkpoint has 8;" in refused.errors
    assert_refused(other, settings)
    assert_refused(none, "--workdir=new: not a run; check the path, or start a run there with --c")


def test_another_text_is_rejected_and_the_run_unchanged(finished):
    config, workdir = finished
    before = newest_checkpoint(workdir)
    file = Path(config.data.source) / "3.txt"
    text = file.read_text(encoding="utf-8")
    file.write_text(text[:-1] + "Z", encoding="utf-8")
    with pytest.raises(UserError, match=r"was trained on different text or with another tokenizer"):
        train(config, str(workdir))
    assert newest_checkpoint(workdir) == before
    file.write_text(text, encoding="utf-8")  # the same text with another time is the same text
    assert train(config, str(workdir)).step == 5


@pytest.mark.oldest_python
def test_a_profile_changes_nothing_and_may_be_requested_on_resume(
    finished, tmp_path, monkeypatch, capsys
):
    config, workdir = finished
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        train(config, str(tmp_path / "parts"))
    train(with_train(config, profile_steps=1), str(tmp_path / "parts"))
    (path,) = (tmp_path / "parts" / "tensorboard").rglob("*.xplane.pb")
    assert b"train_step" in path.read_bytes()
    assert f"profile: {tmp_path / 'parts'}/tensorboard" in capsys.readouterr().out
    assert newest_checkpoint(tmp_path / "parts") == newest_checkpoint(workdir)


def test_the_step_is_compiled_once_and_signals_act_as_before_once_all_is_saved(
    finished, tmp_path, monkeypatch
):
    def evaluate_all(self):
        handlers.append(signal.getsignal(signal.SIGTERM))
        assert newest_checkpoint(tmp_path / "run")["number of steps"] == 5

    def make_train_step(*args, **options):
        steps.append(make_step(*args, **options))
        return steps[-1]

    handlers, steps, make_step = [], [], loop.make_train_step
    monkeypatch.setattr(loop, "make_train_step", make_train_step)
    monkeypatch.setattr(loop.Trainer, "evaluate_all", evaluate_all)
    train(finished[0], str(tmp_path / "run"))
    assert [step._cache_size() for step in steps] == [1]
    assert handlers == [signal.getsignal(signal.SIGTERM)]


SENTENCES = (
    "The cat sat on the mat.",
    "A dog ran after the ball.",
    "Rain fell on the old roof.",
    "She reads a book at night.",
    "Tea is best served hot.",
    "Birds sing in the morning.",
)


@pytest.mark.oldest_python
def test_a_sample_of_a_chat_model_answers_the_prompt(tmp_path):
    chats = records(*[{"messages": talk(("ab", "cd"))}] * 3)
    fields = {"template": "roles", "sample_every": 1, "sample_prompt": "who?", "steps": 2}
    config = small_config(source=str(write(tmp_path / "chat.jsonl", chats)), **fields)
    train(config, str(tmp_path / "run"))
    (sample,) = (row for row in read_metrics(str(tmp_path / "run")) if row["kind"] == "sample")
    template = ChatTemplate(load_template("roles"))
    assert sample["text"].startswith(template.render_next(talk(("who?", None))))


def test_overfits_six_sentences_and_generates_them(tmp_path):
    source = tmp_path / "sentences.jsonl"
    source.write_text("".join(json.dumps({"user": "", "bot": s}) + "\n" for s in SENTENCES))
    config = small_config(
        source=str(source),
        field="bot",
        mode="document",
        num_layers=2,
        hidden_dim=32,
        key_dim=32,
        value_dim=32,
        sequence_length=32,
        learning_rate=1e-2,
        weight_decay=0.0,
        steps=300,
        sample_every=250,
        sample_prompt="Rain",
        sample_tokens=3,
    )
    train(config, str(tmp_path / "run"))
    rows = read_metrics(str(tmp_path / "run"))
    assert np.mean([row["loss"] for row in rows if row["kind"] == "train"][-3:]) < 0.1
    (sample,) = (row for row in rows if row["kind"] == "sample")
    assert (sample["step"], sample["text"][:4]) == (250, "Rain")
    model, tokenizer, _ = load_model(str(tmp_path / "run"))
    prompts = [" ".join(sentence.split()[:2]) for sentence in SENTENCES]
    texts = generate_text(model, tokenizer, prompts, max_new_tokens=40)
    assert [a + b for a, b in zip(prompts, texts, strict=True)] == list(SENTENCES)


def command(folder):
    """scripts/train.py on a small model."""
    flags = {
        "data.source": write_corpus(folder / "text"),
        "data.sequence_length": 7,
        "model.num_layers": 1,
        "train.eval_every": 0,
        "train.save_every": 0,
        "train.steps": 500,
    }
    return (
        *("scripts/train.py", "--config=configs/tiny.py", f"--workdir={folder / 'run'}"),
        *(f"--config.{name}={value}" for name, value in flags.items()),
    )


def test_sigterm_saves_and_the_same_command_resumes(tmp_path):
    process = start_python(*command(tmp_path))
    for line in process.stdout:
        if line.startswith("step 1/"):
            process.send_signal(signal.SIGTERM)
            break
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 75, errors
    assert "SIGTERM: saved at step" in output
    stopped_at = newest_checkpoint(tmp_path / "run")["number of steps"]
    assert 0 < stopped_at < 500
    (resumed,) = run_scripts(command(tmp_path))
    assert resumed.code == 0, resumed.errors
    assert f"at step {stopped_at} of 500" in resumed.output
    assert newest_checkpoint(tmp_path / "run")["number of steps"] == 500


def test_a_loss_that_is_never_finite_ends_a_run(tmp_path, capsys):
    config = small_config(
        source=write_corpus(tmp_path / "text"),
        learning_rate=1e30,
        max_skipped_updates=2,
        sample_every=1,
        sample_tokens=1,
    )
    with pytest.raises(UserError, match="not finite in 2 consecutive steps, up to step"):
        train(config, str(tmp_path / "run"))
    assert "the model's logits are not finite" in capsys.readouterr().out  # in place of a sample


def test_anything_but_a_configuration_is_rejected(tmp_path):
    for wrong, kind in (({"train.steps": 3}, "dict"), (None, "NoneType")):
        with pytest.raises(UserError, match=rf"^config: {kind}; pass a simplernn_jax\.Config"):
            train(wrong, str(tmp_path / "run"))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A run that evaluates 20 tokens and saves at steps 4 and 8: its configuration and folder."""
    folder = tmp_path_factory.mktemp("evaluated")
    fields = {"steps": 10, "eval_every": 4, "save_every": 4, "eval_tokens": 20}
    source = write_corpus(folder / "text")
    return small_config(source=source, validation_fraction=0.3, **fields), folder / "run"


@pytest.mark.oldest_python
def test_the_last_checkpoint_is_evaluated_as_those_before_it(evaluated, capsys):
    config, workdir = evaluated
    result = train(config, workdir)
    folder = CheckpointFolder(str(workdir))
    qualities = {step: read_quality(folder.step_path(step)) for step in folder.steps()}
    assert {8, 10} <= qualities.keys()
    assert {quality.predictions for quality in qualities.values()} == {20}
    assert result.evaluation.predictions > 20
    rows = [row for row in read_metrics(str(workdir)) if row["kind"] != "train"]
    assert [(row["step"], row["kind"], row["predictions"]) for row in rows] == [
        (4, "validation", 20),
        (8, "validation", 20),
        (10, "validation", 20),
        (10, "held_out", result.evaluation.predictions),
    ]
    scored = {row["step"]: row["loss"] for row in rows[:-1]}
    assert {step: qualities[step].validation_loss for step in (8, 10)} == {
        step: scored[step] for step in (8, 10)
    }
    assert f"all held-out text  {result.evaluation}" in capsys.readouterr().out
    best, other = sorted((8, 10), key=scored.get)
    loaded = {x: model_fingerprint(load_model(workdir, x)[0]) for x in ("best", best, other)}
    assert loaded["best"] == loaded[best] != loaded[other]


@pytest.mark.oldest_python
def test_a_signal_during_the_last_step_leaves_the_checkpoint_of_a_whole_run(
    evaluated, tmp_path, monkeypatch
):
    config, workdir = evaluated
    whole = train(config, workdir)
    with monkeypatch.context() as patch:
        stop_after(patch, 10)
        assert train(config, str(tmp_path / "cut")) == loop.Result(10, "SIGTERM", None)
    assert train(config, str(tmp_path / "cut")) == whole
    last = [read_quality(str(path / "checkpoints" / "10")) for path in (workdir, tmp_path / "cut")]
    assert last[0] == last[1]
    assert newest_checkpoint(tmp_path / "cut") == newest_checkpoint(workdir)


@pytest.fixture
def usual_handlers():
    """Handlers of a script; a parallel test run changes them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_a_request_and_the_second_acts_as_before(usual_handlers, number):
    before = signal.getsignal(number)
    with deferred_signals() as poll_signal:
        assert poll_signal(3) is None
        signal.raise_signal(number)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert poll_signal(3) == signal.Signals(number).name
    assert signal.getsignal(number) == before


def test_the_held_out_text_is_scored_once_if_the_last_evaluation_covers_it(tmp_path, monkeypatch):
    class Counting(loop.Evaluator):
        def __call__(self, *arguments, **options):
            scored.append(arguments)
            return super().__call__(*arguments, **options)

    scored = []
    monkeypatch.setattr(loop, "Evaluator", Counting)
    source = write_corpus(tmp_path / "in")
    train(
        small_config(source=source, validation_fraction=0.3, steps=2, eval_every=2),
        tmp_path / "run",
    )
    assert len(scored) == 1
    rows = read_metrics(str(tmp_path / "run"))
    assert [row["kind"] for row in rows if "bits_per_byte" in row] == ["validation", "held_out"]
