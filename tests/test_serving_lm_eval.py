"""Scores by EleutherAI's lm-eval over HTTP, against scoring in process."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from serving_process import serving
from small_runs import HYBRID, save_untrained, small_config, write_corpus

from simplernn_jax import load_model

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

PAIRS = [("ab cé" * (1 + 5 * n), [" d", "é", "a b", "dd"][n % 4] * (1 + n)) for n in range(13)]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = small_config(**HYBRID, source=write_corpus(folder / "texts"))
    save_untrained(config, folder / "untrained")
    return folder / "untrained"


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
    for (context, rest), (score, is_greedy) in zip(PAIRS, found[0], strict=True):
        tokens = jnp.asarray(tokenizer.encode(context + rest))[None]
        logits, _ = model(tokens)
        start = len(tokenizer.encode(context))
        logprobs = jax.nn.log_softmax(logits[0, start - 1 : -1])
        targets = tokens[0, start:]
        wanted = jnp.take_along_axis(logprobs, targets[:, None], axis=-1)
        assert score == pytest.approx(float(jnp.sum(wanted)), abs=1e-4)
        assert is_greedy == bool((np.argmax(logprobs, axis=-1) == np.asarray(targets)).all())
