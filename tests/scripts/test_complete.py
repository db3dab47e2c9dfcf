"""scripts/complete.py on the workdir of a training run, and with wrong places."""

import pytest
from processes import assert_each_refused, run_scripts
from small_runs import untrained_run

from simplernn_jax import load_model
from simplernn_jax.inference.infilling import suggest

SCRIPT = "scripts/complete.py"
TEXT = "abc é\nda b\r\n\nc"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return untrained_run(tmp_path_factory.mktemp("run"), block="residual", fim_rate=0.5)


def test_suggestions_for_a_place(workdir, tmp_path):
    path = tmp_path / "a:b.txt"
    path.write_bytes(TEXT.encode())
    model, tokenizer, _ = load_model(str(workdir))
    flags = [SCRIPT, "--workdir", workdir, "--max_new_tokens=20", "--seed=3"]
    best, end, several = run_scripts(
        [*flags, "-:2:5"],  # before the end of a line
        [*flags, f"{path}:4:2"],
        [*flags, "--num=3", f"{path}:2:5"],
        stdin=TEXT.encode(),
    )
    assert (best.code, end.code, several.code) == (0, 0, 0), best.errors
    for result, at in ((best, 10), (end, len(TEXT))):
        (expected,) = suggest(
            *(model, tokenizer, TEXT[:at], TEXT[at:]), max_new_tokens=20, temperature=0
        )
        assert result.output == expected + "\n"
    assert several.output.startswith("--- 1 of 3 ---\n" + best.output)
    assert several.output.count("---\n") == 3


def test_wrong_places_and_models_are_one_line(workdir, tmp_path):
    (tmp_path / "text").write_text("ab\n")
    (tmp_path / "binary").write_bytes(b"a\0b")
    (tmp_path / "latin").write_bytes("é".encode("latin-1"))
    (tmp_path / "plain").mkdir()
    run, text = f"--workdir={workdir}", f"{tmp_path}/text"
    plain = untrained_run(tmp_path / "plain", block="residual")
    assert_each_refused(
        SCRIPT,
        ([run], "FILE:LINE:COLUMN"),
        ([run, text], "FILE:LINE:COLUMN"),
        ([run, f"{text}:1:1", f"{text}:1:2"], "one place"),
        ([run, f"{text}:3:1"], "no such line", "has 2 lines"),
        ([run, f"{text}:0:1"], "no such line"),
        ([run, f"{text}:1:4"], "no such column", "ends at column 3"),
        ([run, f"{tmp_path}/binary:1:1"], "a binary file"),
        ([run, f"{tmp_path}/latin:1:1"], "invalid UTF-8 at byte 0"),
        ([run, f"{tmp_path}/nothing:1:1"], "no such file"),
        ([f"{text}:1:1"], "no --workdir"),
        ([f"--workdir={plain}", f"{text}:1:1"], "fim_rate"),
    )
