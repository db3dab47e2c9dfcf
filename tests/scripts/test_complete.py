"""scripts/complete.py on the workdir of a training run, and with wrong places."""

from processes import assert_each_refused, run_scripts
from small_runs import untrained_run

from simplernn_jax import load_model
from simplernn_jax.inference.text import suggest

TEXT = "abc é\nda b\n\nc"


def test_suggestions_for_a_place_and_wrong_places(tmp_path):
    workdir = untrained_run(tmp_path, block="parallel", fim_rate=0.5)
    (tmp_path / "a:b").write_bytes(TEXT.encode())
    (tmp_path / "binary").write_bytes(b"\x89PNG\0")
    run, text = f"--workdir={workdir}", f"{tmp_path}/a:b"
    flags = ["scripts/complete.py", run, "--max_new_tokens=20", "--seed=3"]
    best, several = run_scripts(
        [*flags, "--", "-:4:2"], [*flags, "--num=3", f"{text}:2:5"], stdin=TEXT.encode()
    )
    model, tokenizer, _ = load_model(str(workdir))
    fields = {"max_new_tokens": 20, "seed": 3, "temperature": 0.8}
    (expected,) = suggest(model, tokenizer, TEXT, "", **fields)
    assert best.output == expected.replace("\r", "\n") + "\n", best.errors  # as helpers read files
    texts = suggest(model, tokenizer, TEXT[:10], TEXT[10:], 3, **fields)
    found = "".join(f"--- {n} of 3 ---\n{text}\n" for n, text in enumerate(texts, 1))
    assert several.output == found.replace("\r", "\n")
    assert_each_refused(
        "scripts/complete.py",
        ([run], "FILE:LINE:COLUMN"),
        ([run, f"{text}:1:1", f"{text}:1:2"], "no such file"),
        ([run, f"{text}:5:1"], "no such place in 4 lines"),
        ([run, f"{text}:2:6"], "line 2 has 4 characters"),
        ([run, f"{tmp_path}/binary:1:1"], "invalid UTF-8 at byte 0"),
        ([f"{text}:1:1"], "no --workdir"),
    )
