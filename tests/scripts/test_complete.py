"""scripts/complete.py on the workdir of a training run, and with wrong places."""

from processes import assert_each_refused, run_scripts
from small_runs import untrained_run

from simplernn_jax import load_model
from simplernn_jax.inference.text import suggest

SCRIPT = "scripts/complete.py"
TEXT = "abc é\nda b\r\n\nc"


def test_suggestions_for_a_place_and_wrong_places(tmp_path):
    workdir = untrained_run(tmp_path, block="residual", fim_rate=0.5)
    (tmp_path / "a:b").write_bytes(TEXT.encode())
    (tmp_path / "binary").write_bytes(b"a\0b")
    (tmp_path / "latin").write_bytes("é".encode("latin-1"))
    run, text = f"--workdir={workdir}", f"{tmp_path}/a:b"
    flags = [SCRIPT, run, "--max_new_tokens=20", "--seed=3"]
    end, *several = run_scripts(
        [*flags, f"{text}:4:2"],
        [*flags, "--num=3", f"{text}:2:5"],  # before the end of a line
        [*flags, "--num=3", "-:2:5"],
        stdin=TEXT.encode(),
    )
    model, tokenizer, _ = load_model(str(workdir))
    fields = {"max_new_tokens": 20, "seed": 3, "temperature": 0.8}
    (best,) = suggest(model, tokenizer, TEXT, "", **fields)
    assert end.output == best.replace("\r", "\n") + "\n", end.errors  # as helpers read files
    texts = suggest(model, tokenizer, TEXT[:10], TEXT[10:], 3, **fields)
    expected = "".join(f"--- {n} of 3 ---\n{text}\n" for n, text in enumerate(texts, 1))
    assert [result.output for result in several] == [expected.replace("\r", "\n")] * 2
    assert_each_refused(
        SCRIPT,
        ([run], "FILE:LINE:COLUMN"),
        ([run, text], "FILE:LINE:COLUMN"),
        ([run, f"{text}:1:1", f"{text}:1:2"], "one place"),
        ([run, f"{text}:5:1"], "no such line", "has 4 lines"),
        ([run, f"{text}:0:1"], "no such line"),
        ([run, f"{text}:2:6"], "no such column", "ends at column 5"),
        ([run, f"{tmp_path}/binary:1:1"], "a binary file"),
        ([run, f"{tmp_path}/latin:1:1"], "invalid UTF-8 at byte 0"),
        ([run, f"{tmp_path}/nothing:1:1"], "no such file"),
        ([f"{text}:1:1"], "no --workdir"),
    )
