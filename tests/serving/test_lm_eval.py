"""Scores by EleutherAI's lm-eval over HTTP, against scoring in process."""

import jax
import numpy as np
import pytest
from flax import nnx
from serving_process import serving
from small_runs import HYBRID, untrained_run

from simplernn_jax import load_model

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

PAIRS = [("ab cé" * (1 + 5 * n), [" d", "é", "a b", "dd"][n % 4] * (1 + n)) for n in range(13)]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return untrained_run(tmp_path_factory.mktemp("run"), **HYBRID)


@pytest.mark.filterwarnings("ignore")  # of lm-eval and its libraries
def test_log_likelihoods(workdir):
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(PAIRS)]
    found = []
    with serving(workdir, "--slots=4") as server:
        for batch_size in (1, 8):
            client = LocalCompletionsAPI(
                base_url=server.url + "/v1/completions",
                model="untrained",
                batch_size=batch_size,
                num_concurrent=8,
                max_retries=1,
            )
            found.append(client.loglikelihood(requests, disable_tqdm=True))
    assert found[0] == found[1]
    model, tokenizer, _ = load_model(str(workdir))
    encoded = [tokenizer.encode(context + rest) for context, rest in PAIRS]
    padded = np.zeros((len(PAIRS), max(map(len, encoded))), np.int32)
    for row, ids in zip(padded, encoded, strict=True):
        row[: len(ids)] = ids
    score_all = nnx.jit(lambda model, tokens: jax.nn.log_softmax(model(tokens)[0]))
    logprobs = np.asarray(score_all(model, padded))
    for (context, _), (score, is_greedy), ids, of_text in zip(
        PAIRS, found[0], encoded, logprobs, strict=True
    ):
        start = len(tokenizer.encode(context))
        predictions, targets = of_text[start - 1 : len(ids) - 1], ids[start:]
        wanted = predictions[np.arange(len(targets)), targets].sum()
        assert score == pytest.approx(float(wanted), abs=1e-4)
        assert is_greedy == bool((predictions.argmax(axis=-1) == targets).all())
