"""Decoding with drafts gives the bits of decoding token by token, in fewer calls."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from references import needs_compiler

from benchmarks.stress.lookup import MODELS, lookup, make_model
from simplernn_jax.inference import engine, generate
from simplernn_jax.inference.sampling import Sampling
from simplernn_jax.ops.draft import RECENT, append_tokens, draft_tokens, empty_history
from simplernn_jax.serving.jobs import Job, NewTokens
from simplernn_jax.serving.scheduler import Scheduler

pytestmark = needs_compiler
ORDER, WINDOW = 3, 9


def looked_up(text, following, limit):
    """The definition: what followed the newest match of the last tokens."""
    text = [*text, following]
    ends = [end for end in range(ORDER, len(text)) if text[end - ORDER : end] == text[-ORDER:]]
    if not ends or len(text) < ORDER:
        return []
    matched = ORDER
    while matched < ends[-1] and text[ends[-1] - matched - 1] == text[-matched - 1]:
        matched += 1
    draft = []
    for i in range(min(limit, matched - ORDER + 1)):
        draft.append((text + draft)[ends[-1] + i])
    return draft


@pytest.mark.oldest_python
@pytest.mark.parametrize("num_ids", [2, 5, 300])
def test_drafts_are_what_followed_the_last_tokens_before(num_ids):
    draw = np.random.default_rng(num_ids)
    texts = draw.integers(0, num_ids, (40, 30), np.int32)
    texts[:, 20:] = texts[:, 5:15]
    counts = draw.integers(0, 31, 40, np.int32)
    following = draw.integers(0, num_ids, 40, np.int32)
    following[::2] = texts[::2, 15]
    counts[::2] = 30
    history = append_tokens(empty_history(40, ORDER), texts, counts)
    history = history._replace(cursor=history.cursor.at[:, 1:3].set(0))  # no earlier match
    arguments = map(jnp.asarray, (texts, counts * 0, following, np.full(40, WINDOW, np.int32)))
    drafts, number, after = draft_tokens(history, *arguments, WINDOW)
    chex.assert_trees_all_equal(after, history)
    num_drafted = 0
    for n in range(40):
        expected = looked_up(texts[n, : counts[n]].tolist(), following[n], WINDOW - 1)
        assert drafts[n, : number[n]].tolist() == [following[n], *expected]
        num_drafted += len(expected)
    assert num_drafted > 40


def test_only_recent_tokens_are_looked_up():
    text = np.arange(RECENT + 10, dtype=np.int32)[None]
    history = append_tokens(empty_history(1, ORDER), text, np.array([RECENT + 10], np.int32))
    for start, is_found in ((0, False), (RECENT - 50, True)):
        rest = jnp.array([[5], [start + 5], [8]], jnp.int32)
        _, number, _ = draft_tokens(history, jnp.asarray(text[:, start : start + 5]), *rest, WINDOW)
        assert (number[0] > 1) == is_found


def test_the_bits_are_those_of_decoding_token_by_token(tmp_path):
    cases = list(lookup(tmp_path, 120, seed=1))
    assert [case for case in cases if case.problem is not None] == []
    assert len({case.kind for case in cases}) == len(MODELS)


def test_drafts_of_repetitive_text_are_accepted():
    model, prompt, count = make_model(71), [1, 2, 3, 4] * 10, 200
    with_drafts, without = (
        generate(model, prompt, max_new_tokens=count, lookup=use) for use in (True, False)
    )
    chex.assert_trees_all_equal(with_drafts.tokens, without.tokens)
    chex.assert_trees_all_equal(with_drafts.state, without.state)
    ((drafted, accepted),) = with_drafts.drafts
    assert drafted >= accepted > count / 2
    assert not without.drafts.any()


def test_the_server_gives_the_same_alone_among_others_and_without_drafts(monkeypatch):
    model = make_model(71)

    def answers(jobs, num_slots):
        scheduler = Scheduler(model, num_slots, cache_bytes=0)
        scheduler.waiting.extend(jobs)
        found = {}
        while not scheduler.is_idle:
            for job, event in scheduler.step():
                if isinstance(event, NewTokens):
                    found.setdefault(job.sampling.seed, []).extend(event.tokens.tolist())
        return found

    def make_jobs():
        settings = [{"temperature": 0.1 * n, "presence_penalty": 0.3 * (n % 3)} for n in range(32)]
        return [
            Job(np.arange(n % 7 + 1, dtype=np.int32), Sampling(seed=n, **one), max_tokens=9 + 5 * n)
            for n, one in enumerate(settings)
        ]

    together = answers(make_jobs(), 32)
    assert [len(together[n]) for n in range(32)] == [9 + 5 * n for n in range(32)]
    for job in make_jobs()[::8]:
        assert answers([job], 32) == {job.sampling.seed: together[job.sampling.seed]}
    monkeypatch.setattr(engine, "LOOKUPS", 0)
    assert answers(make_jobs(), 32) == together
