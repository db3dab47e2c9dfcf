"""Continuous batching: what a sequence gets does not depend on slots, neighbors or the cache."""

import itertools
import math
import random
import time
from unittest import mock

import numpy as np
import pytest
from flax import nnx
from references import needs_compiler
from small_runs import HYBRID, small_model

from simplernn_jax.inference import generate, quantize_model
from simplernn_jax.serving import decoder as decoding
from simplernn_jax.serving.decoder import PREFILL_TOKENS, UNREAD_SECONDS, Decoder
from simplernn_jax.serving.jobs import Failed, Job, NewTokens, Prefilled, Root, Sampling
from simplernn_jax.serving.prefix_cache import GRID, PrefixCache, is_kept, prefix_keys
from simplernn_jax.serving.slots import MAX_BLOCK

VOCAB = 31
EOS = 29


@pytest.fixture(scope="module")
def model():
    return small_model(**HYBRID, mixer_options={"context": 23}, vocab_size=VOCAB)


@pytest.fixture(scope="module")
def decoder(model):
    return Decoder(model, num_slots=5, cache_bytes=1 << 24)


def tokens_of(seed, length):
    return np.random.default_rng(seed).integers(0, VOCAB, length, np.int32)


def jobs_of_all_kinds():
    settings = [
        {},
        {"temperature": 0.8},
        {"temperature": 1.3, "top_k": 7, "top_p": 0.9},
        {"temperature": 0.7, "min_p": 0.05, "repetition_penalty": 1.3},
        {"temperature": 1.0, "presence_penalty": 0.5, "frequency_penalty": 0.3},
        {"temperature": 1.0, "logit_bias": {3: 5.0}, "banned_ids": (4, 5)},
        {"temperature": 1.0, "stop_ids": (2, 20)},
    ]
    return [
        Job(
            tokens_of(index % 3, 50 + 37 * index),
            Sampling(seed=index, **one),
            max_tokens=11 + index,
            num_choices=1 + (index % 3 == 1),
            num_logprobs=3 * (index % 2),
            is_streamed=index % 2 == 0,
        )
        for index, one in enumerate(settings)
    ]


def run(decoder, jobs):
    """Run `jobs` together; return (tokens, log-probabilities, reason) by (seed, choice)."""
    decoder.waiting.extend(jobs)
    parts, cached = {}, {}
    while not decoder.is_idle:
        for job, event in decoder.step():
            if isinstance(event, Prefilled):
                cached[job.sampling.seed] = event.cached_tokens
            elif isinstance(event, NewTokens):
                parts.setdefault((job.sampling.seed, event.choice), []).append(event)
    found = {
        key: (
            np.concatenate([event.tokens for event in events]).tolist(),
            b"".join(b"" if e.logprobs is None else e.logprobs.top.tobytes() for e in events),
            [event.finish_reason for event in events if event.finish_reason],
        )
        for key, events in parts.items()
    }
    return found, cached


@pytest.mark.oldest_python
def test_failed_jobs_report_tokens_that_were_held_back(decoder, monkeypatch):
    job = Job(tokens_of(3, 5), Sampling(), 10 * MAX_BLOCK, is_streamed=True)
    (expected,) = run(decoder, [job])[0].values()
    monkeypatch.setattr(decoding, "EVENT_SECONDS", math.inf)
    decoder.waiting.append(Job(job.tokens, job.sampling, job.max_tokens, is_streamed=True))
    events = [event for _ in range(9) for _, event in decoder.step()]
    failed = Failed("such as a lack of memory")
    left = [event for _, event in decoder.fail_all(failed)]
    decoder.reset()
    assert left[-1] is failed
    assert len(left) == 2
    tokens = [event.tokens for event in [*events, *left] if isinstance(event, NewTokens)]
    assert len(tokens) == 2
    found = np.concatenate(tokens).tolist()
    assert len(found) > len(tokens[0])
    assert found == expected[0][: len(found)]


@pytest.mark.oldest_python
def test_events_close_to_each_other_are_one(decoder, monkeypatch):
    def jobs():
        return [Job(tokens_of(3, 5), Sampling(), 150, num_logprobs=2, is_streamed=True)]

    expected, _ = run(decoder, jobs())
    monkeypatch.setattr(decoding, "EVENT_SECONDS", math.inf)
    (job,) = jobs()
    decoder.waiting.append(job)
    events = []
    while not decoder.is_idle:
        events += [event for _, event in decoder.step() if isinstance(event, NewTokens)]
    assert len(events) == 2  # the first one never waits, and the last one ends the text
    assert events[0].finish_reason is None
    tokens = np.concatenate([event.tokens for event in events])
    top = np.concatenate([event.logprobs.top for event in events])
    ((found, logprobs, _),) = expected.values()
    assert (tokens.tolist(), top.tobytes()) == (found, logprobs)


def test_alone_together_and_from_the_cache_are_the_same_bits(decoder):
    alone = {}
    for job in jobs_of_all_kinds():
        decoder.cache.clear()
        alone |= run(decoder, [job])[0]
    assert all(len(reasons) == 1 for _, _, reasons in alone.values())
    assert {reason for _, _, (reason,) in alone.values()} == {"length", "stop"}
    decoder.cache.clear()
    together, cached = run(decoder, jobs_of_all_kinds()[::-1])
    assert together == alone
    again, cached = run(decoder, jobs_of_all_kinds())
    assert again == alone
    assert cached == {
        job.sampling.seed: len(job.tokens) // GRID * GRID for job in jobs_of_all_kinds()
    }


@pytest.mark.oldest_python
@needs_compiler
def test_where_a_c_function_decodes_the_number_of_slots_changes_no_bit():
    # With as many ids, XLA orders the sums of a softmax over 1 or 2 sequences in another way.
    model = quantize_model(small_model("residual", vocab_size=259), "int8")
    few, many = (Decoder(model, num_slots=n, cache_bytes=1 << 24) for n in (1, 32))
    alone = {}
    for job in jobs_of_all_kinds()[:4]:
        alone |= run(few, [job])[0]
    assert run(many, jobs_of_all_kinds()[:4])[0] == alone


@pytest.fixture(scope="module")
def native_decoder():
    model = small_model("residual", vocab_size=VOCAB)
    return Decoder(model, num_slots=5, cache_bytes=0)


@needs_compiler
@pytest.mark.parametrize("which", ["decoder", "native_decoder"])
def test_jobs_that_pause_give_the_same_bits(which, request, monkeypatch):
    decoder = request.getfixturevalue(which)
    expected, _ = run(decoder, jobs_of_all_kinds())
    jobs, draw, step = jobs_of_all_kinds()[::-1], random.Random(0), decoder.step
    for name in ("SHORT_SECONDS", "LONG_SECONDS"):
        monkeypatch.setattr(decoding, name, 0.0)  # blocks of one token

    def step_with_pauses():
        for job in jobs:
            job.unread_since = time.monotonic() if draw.random() < 0.5 else None
        return step()

    monkeypatch.setattr(decoder, "step", step_with_pauses)
    assert run(decoder, jobs)[0] == expected


def test_a_job_that_pauses_gives_way_but_keeps_its_slots_while_nobody_waits(decoder):
    def job(**options):
        return Job(tokens_of(3, 5), Sampling(), **{"max_tokens": 40} | options)

    unread, other = job(num_choices=7, max_tokens=10**6), job()
    decoder.waiting.append(unread)
    events = decoder.step()
    unread.unread_since = time.monotonic()
    for _ in range(3):
        events += decoder.step()
    assert decoder.is_stalled
    assert decoder.num_active == 5
    assert decoder.step() == []
    decoder.waiting.append(other)
    assert decoder.step() == [(other, mock.ANY)]  # its prompt; it waits for a slot
    unread.unread_since -= UNREAD_SECONDS + 1
    later = list(itertools.chain.from_iterable(iter_steps(decoder)))
    assert [event for job, event in later if job is unread] == [Failed(mock.ANY)]
    assert sum(len(e.tokens) for j, e in later if j is other) == 40
    assert unread.is_cancelled


@pytest.fixture
def start_unread(decoder):
    """Start a job whose client has not read for `seconds`."""

    def start(num_choices, seconds):
        job = Job(tokens_of(3, 5), Sampling(), max_tokens=10**6, num_choices=num_choices)
        decoder.waiting.append(job)
        decoder.step()
        job.unread_since = time.monotonic() - seconds
        decoder.step()
        return job

    yield start
    decoder.fail_all(Failed("the test has ended"))
    decoder.reset()


def test_a_job_that_pauses_is_kept_while_slots_are_free(decoder, start_unread):
    unread = start_unread(4, UNREAD_SECONDS + 1)  # in five slots
    other = Job(tokens_of(3, 5), Sampling(), max_tokens=40)
    decoder.waiting.append(other)
    events = [event for _ in range(60) for event in decoder.step()]
    assert events[-1] == (other, mock.ANY)
    assert events[-1][1].finish_reason == "length"
    assert {job for job, _ in events} == {other}
    assert not unread.is_cancelled


def test_a_job_that_pauses_does_not_wait_for_itself(decoder, start_unread):
    unread = start_unread(7, UNREAD_SECONDS + 1)  # in five slots
    assert decoder.step() == []
    assert decoder.is_stalled
    prefill = Job(tokens_of(4, 5), Sampling())  # needs no slot
    decoder.waiting.append(prefill)
    assert decoder.step() == [(prefill, mock.ANY)]
    assert decoder.step() == []
    assert not unread.is_cancelled


def test_steps_that_wait_for_a_slot_are_stalled_beside_an_unfinished_prefill(decoder, start_unread):
    start_unread(5, 0.0)
    long = Job(tokens_of(12, 20_000), Sampling(), max_tokens=1)
    decoder.waiting.append(long)
    assert decoder.step() == []
    assert not decoder.is_stalled  # it prefills
    ready = Job(tokens_of(3, 5), Sampling(), max_tokens=1)
    decoder.waiting.append(ready)
    while (ready, mock.ANY) not in decoder.step():
        assert not decoder.is_stalled
    for _ in range(3):
        assert decoder.step() == []
        assert decoder.is_stalled
    assert decoder.num_waiting == 2


def test_jobs_start_before_one_that_pauses(decoder):
    unread = Job(tokens_of(3, 5), Sampling(), max_tokens=4, unread_since=math.inf)
    other = Job(tokens_of(3, 5), Sampling(), max_tokens=4)
    decoder.waiting.extend([unread, other])
    for _ in range(4):
        ended = [job for job, event in decoder.step() if getattr(event, "finish_reason", None)]
        if ended:
            break
    assert ended == [other]
    unread.unread_since = None
    run(decoder, [])


def test_greedy_tokens_are_those_of_generate(model, decoder):
    prompt = tokens_of(5, 70)
    job = Job(prompt, Sampling(stop_ids=(EOS,)), max_tokens=17)
    expected = generate(model, [prompt], max_new_tokens=17, eos_id=EOS).sequences()[0]
    assert run(decoder, [job])[0][0, 0][0] == expected.tolist()


def test_scores_are_log_softmax(model, decoder):
    prompt = tokens_of(6, 77)
    job = Job(prompt, Sampling(), scores_prompt=True, num_logprobs=4)
    decoder.waiting.append(job)
    events = list(itertools.chain.from_iterable(iter_steps(decoder)))
    logprobs = events[0][1].logprobs
    logits = np.asarray(
        nnx.jit(lambda model, tokens: model(tokens))(model, prompt[None])[0][0], np.float64
    )
    expected = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    np.testing.assert_allclose(
        logprobs.token, expected[np.arange(76), prompt[1:]], rtol=0, atol=2e-5
    )
    np.testing.assert_array_equal(logprobs.top_ids[:, 0], expected[:-1].argmax(axis=-1))
    np.testing.assert_allclose(logprobs.top[:, 0], expected[:-1].max(axis=-1), rtol=0, atol=2e-5)


def iter_steps(decoder):
    while not decoder.is_idle:
        yield decoder.step()


@pytest.mark.parametrize("slots", [1, 2])
def test_a_block_after_every_end_does_not_change_the_time_per_token(model, monkeypatch, slots):
    decoder = Decoder(model, num_slots=slots, cache_bytes=0)
    collect, seen = Decoder._collect, []

    def record(self, dispatched):
        before = self._token_seconds
        collect(self, dispatched)
        is_empty = not np.any(dispatched.block.counts)
        seen.append((is_empty, self._token_seconds == before))

    monkeypatch.setattr(Decoder, "_collect", record)
    jobs = [Job(tokens_of(n, 9), Sampling(seed=n), max_tokens=300) for n in range(slots)]
    run(decoder, jobs)
    assert {is_empty for is_empty, _ in seen} == {True, False}
    assert all(is_same == is_empty for is_empty, is_same in seen)


def test_a_state_continues_as_often_as_wanted(decoder):
    first, second = tokens_of(7, 45), tokens_of(8, 66)
    decoder.waiting.append(Job(first, Sampling(), keeps_state=True))
    (_, prefilled), = itertools.chain.from_iterable(iter_steps(decoder))  # fmt: skip
    root = Root(b"digest", prefilled.root.layers, prefilled.root.logits)

    def continued(tokens):
        job = Job(tokens, Sampling(seed=3), max_tokens=9, root=root, num_logprobs=2)
        return run(decoder, [job])

    (found, cached), (again, cached_again) = continued(second), continued(second)
    assert found == again
    assert (cached[3], cached_again[3]) == (0, GRID)
    assert continued(second[:0])[0] != found
    whole = Job(np.concatenate([first, second]), Sampling(seed=3), max_tokens=9, num_logprobs=2)
    assert run(decoder, [whole])[0][3, 0][0] == found[3, 0][0]  # equal but for rounding


def test_a_cancelled_job_frees_its_slots(decoder):
    job = Job(tokens_of(9, 10), Sampling(), max_tokens=10**6, num_choices=7)
    decoder.waiting.append(job)
    decoder.step()
    decoder.step()
    assert decoder.num_active == 5
    job.cancelled_choices.add(0)
    decoder.step()
    assert decoder.num_active == 5  # the next choice took its slot
    job.is_cancelled = True
    decoder.step()
    decoder.step()
    assert decoder.is_idle


def test_a_long_prompt_alone_is_prefilled_in_many_steps(decoder):
    job = Job(tokens_of(11, 5000), Sampling(), max_tokens=1)
    decoder.waiting.append(job)
    assert decoder.step() == []
    job.is_cancelled = True
    decoder.step()
    assert decoder.is_idle


@pytest.mark.oldest_python
@pytest.mark.parametrize("step", range(1, 12, 2))
def test_every_job_of_a_failing_step_gets_an_end(model, monkeypatch, step):
    decoder = Decoder(model, num_slots=3, cache_bytes=0)
    jobs = [
        Job(
            tokens_of(i, 40 + 30 * i), Sampling(seed=i), max_tokens=3 + 9 * i, num_choices=1 + i % 2
        )
        for i in range(5)
    ]
    decoder.waiting.extend(jobs)
    events = [event for _ in range(step) for event in decoder.step()]
    monkeypatch.setattr(decoder, "_dispatch", mock.Mock(side_effect=MemoryError))
    failed = Failed("no memory")
    try:
        while not decoder.is_idle:
            events += decoder.step()
    except MemoryError:
        events += decoder.fail_all(failed)
    ended = {job for job, event in events if event is failed}
    choices = [(j, e.choice) for j, e in events if isinstance(e, NewTokens) and e.finish_reason]
    complete = {job for job in jobs if len({c for j, c in choices if j is job}) == job.num_choices}
    assert ended | complete == set(jobs)
    decoder.reset()
    monkeypatch.undo()
    assert decoder.is_idle
    assert run(decoder, [jobs[0]])


def test_a_long_prompt_does_not_stall_streams(decoder, monkeypatch):
    monkeypatch.setattr(decoding, "EVENT_SECONDS", 0.0)  # every block is reported
    stream = Job(tokens_of(1, 3), Sampling(), max_tokens=10**6, is_streamed=True)
    long = Job(tokens_of(2, 5000), Sampling(), max_tokens=1)
    decoder.waiting.append(stream)
    decoder.step()
    decoder.waiting.append(long)
    counts = []
    for events in iter_steps(decoder):
        counts.append(sum(len(event.tokens) for job, event in events if job is stream))
        if any(job is long for job, _ in events):
            break
    stream.is_cancelled = True
    run(decoder, [])
    assert len(counts) >= 5000 // (PREFILL_TOKENS + GRID)
    # The first block was collected early, and the last step has the long job's first token.
    assert all(0 < count <= MAX_BLOCK for count in counts[1:-1])


def test_prefix_cache_is_bounded_and_forgets_the_least_recently_used():
    cache = PrefixCache(max_bytes=3 * 80)
    states = [np.full(5, i, np.float64) for i in range(4)]
    keys = [bytes([i]) for i in range(4)]
    for key, state in zip(keys[:3], states, strict=False):
        cache.add(key, (state, state))
    assert cache.longest(keys[:1])[0] == 1
    cache.add(keys[3], (states[3], states[3]))
    assert (cache.longest(keys[1:2])[0], cache.longest(keys[:1])[0]) == (0, 1)
    assert (cache.num_bytes, cache.num_evicted) == (240, 1)
    cache.add(b"large", (np.zeros(31), np.zeros(0)))
    assert cache.num_bytes == 240


def test_prefixes_have_keys_of_their_own():
    tokens = tokens_of(0, 3 * GRID + 5)
    keys = prefix_keys(b"", tokens)
    assert len(set(keys)) == 3
    assert keys[:2] == prefix_keys(b"", tokens[: 2 * GRID])
    assert not set(keys) & set(prefix_keys(b"root", tokens))
    tokens[0] += 1
    assert not set(keys) & set(prefix_keys(b"", tokens))


def test_a_long_prompt_keeps_few_states_but_its_last_one():
    length = 50_000
    kept = [p for p in range(GRID, length, GRID) if is_kept(p, length)]
    assert kept[-1] == length // GRID * GRID
    assert len(kept) < 300
    assert all(
        after - before <= max(GRID, before / 8) for before, after in itertools.pairwise(kept)
    )
