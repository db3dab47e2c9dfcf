"""Continuous batching: what a sequence gets does not depend on slots, neighbors or the cache."""

import math
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import needs_compiler
from small_runs import HYBRID, small_model

from benchmarks.stress.edits import edits
from simplernn_jax.data.infilling import InfillPrompt
from simplernn_jax.inference import generate, quantize_model
from simplernn_jax.inference.engine import MAX_BLOCK, PrefixState
from simplernn_jax.inference.sampling import Sampling
from simplernn_jax.inference.state import empty_state
from simplernn_jax.serving import scheduler as scheduling
from simplernn_jax.serving.jobs import Job, NewTokens, Prefilled, Prefix
from simplernn_jax.serving.prefill import GRID, PrefixCache, PrefixKeys
from simplernn_jax.serving.scheduler import PREFILL_TOKENS, Scheduler

VOCAB = 31
EOS = 29


@pytest.fixture(scope="module")
def model():
    return small_model(**HYBRID, mixer_options={"context": 23}, vocab_size=VOCAB)


@pytest.fixture(scope="module")
def scheduler(model):
    return Scheduler(model, num_slots=5, cache_bytes=1 << 24)


def tokens_of(seed, length):
    return np.random.default_rng(seed).integers(0, VOCAB, length, np.int32)


def make_job(seed=3, length=5, **options):
    return Job(tokens_of(seed, length), Sampling(), **options)


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
            num_logprobs=3 if index % 2 else None,
            is_streamed=index % 2 == 0,
        )
        for index, one in enumerate(settings)
    ]


def run(scheduler, jobs):
    """Run `jobs` together; return (tokens, log-probabilities, reason) by (seed, choice)."""
    scheduler.waiting.extend(jobs)
    parts, cached = {}, {}
    while not scheduler.is_idle:
        for job, event in scheduler.step():
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


def collect(scheduler, job):
    """Run a job; return its events."""
    scheduler.waiting.append(job)
    events = []
    while not scheduler.is_idle:
        events += [event for _, event in scheduler.step()]
    return events


def joined(events):
    return np.concatenate([e.tokens for e in events if isinstance(e, NewTokens)]).tolist()


@pytest.mark.oldest_python
def test_events_close_to_each_other_are_one(scheduler, monkeypatch):
    options = {"max_tokens": 150, "num_logprobs": 2, "is_streamed": True}
    _, *expected = collect(scheduler, make_job(**options))
    monkeypatch.setattr(scheduling, "EVENT_SECONDS", math.inf)
    _, *events = collect(scheduler, make_job(**options))
    assert len(events) == 2  # the first one never waits, and the last one ends the text
    assert events[0].finish_reason is None
    assert joined(events) == joined(expected)
    tops = [np.concatenate([e.logprobs.top for e in each]) for each in (events, expected)]
    np.testing.assert_array_equal(*tops)


def test_alone_together_and_from_the_cache_are_the_same_bits(model):
    without_cache = Scheduler(model, num_slots=5, cache_bytes=0)
    scheduler = Scheduler(model, num_slots=5, cache_bytes=1 << 24)
    alone = {}
    for job in jobs_of_all_kinds():
        alone |= run(without_cache, [job])[0]
    assert all(len(reasons) == 1 for _, _, reasons in alone.values())
    assert {reason for _, _, (reason,) in alone.values()} == {"length", "stop"}
    together, cached = run(scheduler, jobs_of_all_kinds()[::-1])
    assert together == alone
    again, cached = run(scheduler, jobs_of_all_kinds())
    assert again == alone
    assert cached == {
        job.sampling.seed: len(job.tokens) // GRID * GRID for job in jobs_of_all_kinds()
    }


@pytest.fixture(scope="module")
def native_model():
    return small_model("parallel", vocab_size=VOCAB)


@pytest.fixture(scope="module")
def native_scheduler(native_model):
    return Scheduler(native_model, num_slots=5, cache_bytes=0)


@needs_compiler
@pytest.mark.parametrize("which", ["scheduler", "native_scheduler"])
def test_jobs_that_pause_give_the_same_bits(which, request, monkeypatch):
    scheduler = request.getfixturevalue(which)
    expected, _ = run(scheduler, jobs_of_all_kinds())
    jobs, draw, step = jobs_of_all_kinds()[::-1], random.Random(0), scheduler.step
    for name in ("SHORT_SECONDS", "LONG_SECONDS"):
        monkeypatch.setattr(scheduling, name, 0.0)  # blocks of one token

    def step_with_pauses():
        for job in jobs:
            job.is_paused = draw.random() < 0.5
        return step()

    monkeypatch.setattr(scheduler, "step", step_with_pauses)
    assert run(scheduler, jobs)[0] == expected


@needs_compiler
@pytest.mark.parametrize("which", ["hybrid", "native"])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.9, "top_k": 20, "seed": 3}])
def test_tokens_are_those_of_generate(model, native_model, which, settings):
    """One engine decodes for both; prompts are prefilled in other chunks."""
    model = model if which == "hybrid" else native_model
    prompt = tokens_of(5, 70)
    expected = generate(model, [prompt], max_new_tokens=17, eos_id=EOS, **settings).sequences()[0]
    job = Job(prompt, Sampling(stop_ids=(EOS,), **settings), max_tokens=17)
    assert joined(collect(Scheduler(model, num_slots=3, cache_bytes=0), job)) == expected.tolist()


def test_a_state_continues_as_often_as_wanted(scheduler):
    first, second = tokens_of(7, 45), tokens_of(8, 66)
    (prefilled,) = collect(scheduler, Job(first, Sampling(), keeps_state=True))

    def continued(tokens):
        prefix = Prefix(prefilled.state, b"digest", first)
        job = Job(tokens, Sampling(seed=3), max_tokens=9, num_logprobs=2, prefix=prefix)
        return run(scheduler, [job])

    (found, cached), (again, cached_again) = continued(second), continued(second)
    assert found == again
    assert (cached[3], cached_again[3]) == (0, GRID)
    assert continued(second[:0])[0] != found
    whole = Job(np.concatenate([first, second]), Sampling(seed=3), max_tokens=9, num_logprobs=2)
    assert run(scheduler, [whole])[0][3, 0][0] == found[3, 0][0]  # equal but for rounding


@pytest.mark.parametrize(
    ("num_optional", "num_left"), [(5, 4 * GRID), (2 * GRID + 3, 4 * GRID + 1)]
)
def test_a_prompt_without_time_leaves_out_its_context(scheduler, num_optional, num_left):
    """As if it had none, also from the cache, and with a logit mask for the first token."""
    tokens = tokens_of(num_optional, num_left - 1 + num_optional)
    first_ids = np.array([7, 9])

    def job(tokens, num_optional, **options):
        infill = InfillPrompt(tokens, num_optional, (), (9,), (first_ids,), (1,))
        options |= {"max_tokens": 9, "num_logprobs": 2, "infill": infill}
        return Job(tokens, Sampling(seed=3), **options)

    cut = np.delete(tokens, range(1, num_optional))
    expected, _ = run(scheduler, [job(cut, 1)])
    for _ in range(2):
        hurried = job(tokens, num_optional, prompt_seconds=0.0)
        assert run(scheduler, [hurried])[0] == expected
        assert hurried.tokens.tolist() == cut.tolist()
    patient = job(tokens, num_optional, prompt_seconds=1e6)
    assert run(scheduler, [patient])[0] != expected
    assert patient.tokens.tolist() == tokens.tolist()
    assert expected[3, 0][0][0] in first_ids


def test_typed_tokens_that_stay_are_the_first_new_ones(scheduler):
    tokens, few, none = tokens_of(0, 70), np.array([6, 9]), np.array([], np.int64)

    def found(tokens, *healing):
        infill = InfillPrompt(tokens, 0, (), *healing)
        job = Job(tokens, Sampling(seed=3), max_tokens=9, num_logprobs=2, infill=infill)
        return joined(collect(scheduler, job))

    one = found(np.append(tokens, np.int32(5)), (6,), (few,), (1,))
    assert found(tokens, (5, 6), (none, few), (2, 1)) == [5, *one]
    assert one[0] in few


@needs_compiler
@pytest.mark.oldest_python
def test_a_job_gets_the_same_alone_among_31_others_and_without_drafts(monkeypatch):
    """Also after a learned state, and in a server with fewer slots."""
    # With as many ids, XLA orders the sums of a softmax over 1 or 2 sequences in another way.
    model = quantize_model(small_model("parallel", vocab_size=259), "int8")

    def make_job(seed):
        draw, state = np.random.default_rng(seed), empty_state(model, 1)
        layers = jax.tree.map(lambda x: jnp.float32(draw.normal(size=x.shape)), state.layers)
        learned = Prefix(PrefixState(layers, state.logits), bytes([seed]), tokens_of(0, 0))
        return Job(
            tokens_of(seed, 1 + seed % 5),
            Sampling(
                seed=seed,
                temperature=0.05 * seed,
                top_p=0.9 if seed % 4 else 1.0,
                min_p=0.05 if seed % 5 else 0.0,
                repetition_penalty=1 + 0.3 * (seed % 3),
            ),
            max_tokens=9 + 5 * seed,
            num_logprobs=2,
            prefix=learned if seed % 2 else None,
        )

    scheduler, alone = (Scheduler(model, num_slots=n, cache_bytes=1 << 24) for n in (32, 1))
    together, _ = run(scheduler, [make_job(seed) for seed in range(32)])
    assert len({tuple(tokens) for tokens, *_ in together.values()}) > 16
    for seed in range(0, 32, 7):
        assert run(alone, [make_job(seed)])[0][seed, 0] == together[seed, 0]
    monkeypatch.setattr(scheduling, "use_lookup", lambda *_: False)
    assert run(scheduler, [make_job(seed) for seed in range(32)])[0] == together


def test_a_cancelled_job_frees_its_slots(scheduler):
    job = make_job(max_tokens=10**6, num_choices=7)
    scheduler.waiting.append(job)
    scheduler.step()
    assert scheduler.num_active == 5
    job.cancelled_choices.add(0)
    scheduler.drop_cancelled()
    assert scheduler.num_active == 4
    scheduler.step()
    assert scheduler.num_active == 5  # the next choice took its slot
    long = make_job(11, 5000, max_tokens=1)
    scheduler.waiting.append(long)
    scheduler.step()
    job.is_cancelled = long.is_cancelled = True
    scheduler.drop_cancelled()
    run(scheduler, [])
    assert (scheduler.num_active, scheduler.num_waiting) == (0, 0)


def test_a_long_prompt_does_not_stall_streams(scheduler, monkeypatch):
    monkeypatch.setattr(scheduling, "EVENT_SECONDS", 0.0)  # every block is reported
    stream = make_job(1, 3, max_tokens=10**6, is_streamed=True)
    long = make_job(2, 5000, max_tokens=1)
    scheduler.waiting.append(stream)
    scheduler.step()
    scheduler.waiting.append(long)
    counts = []
    while not scheduler.is_idle:
        events = scheduler.step()
        counts.append(sum(len(event.tokens) for job, event in events if job is stream))
        if any(job is long for job, _ in events):
            break
    stream.is_cancelled = True
    scheduler.drop_cancelled()
    run(scheduler, [])
    assert len(counts) >= 5000 // (PREFILL_TOKENS + GRID)
    # The first block was collected early, and the last step has the long job's first token.
    assert all(0 < count <= MAX_BLOCK for count in counts[1:-1])


def test_prefix_cache_is_bounded_and_forgets_the_least_recently_used():
    cache = PrefixCache(max_bytes=3 * 80)
    states = [np.full(5, i, np.float64) for i in range(4)]
    keys = [PrefixKeys(bytes(32), np.array([i], np.int32)) for i in range(4)]
    for key, state in zip(keys[:3], states, strict=False):
        cache.add(key.at(1), (state, state))
    assert cache.longest(keys[0])[0] == 1
    cache.add(keys[3].at(1), (states[3], states[3]))
    assert (cache.longest(keys[1])[0], cache.longest(keys[0])[0]) == (0, 1)
    assert (cache.num_bytes, cache.num_evicted) == (240, 1)
    tokens = np.arange(2 * GRID, dtype=np.int32)
    for length in (7, 70, 99):
        cache.add(PrefixKeys(bytes(32), tokens[:length]).last, (states[0], states[0]))
    keys[:2] = (PrefixKeys(bytes(32), tokens[:length]) for length in (80, 8))
    assert [cache.longest(key)[0] for key in keys[:2]] == [70, 7]
    cache.add(keys[3].at(1), (states[3], states[3]))  # in place of 99: 7 was used with 70
    assert [cache.longest(key)[0] for key in keys[:2]] == [70, 7]
    cache.add(b"large", (np.zeros(31), np.zeros(0)))
    assert cache.num_bytes == 240
    cache = PrefixCache(max_bytes=100 * 80)
    for token in range(100):  # all with the same digest
        cache.add(PrefixKeys(bytes(32), tokens[token:][: 1 + token % 9]).last, states[:2])
    assert cache.longest(PrefixKeys(bytes(32), tokens[40:])) == (5, states[:2])
    assert cache.longest(PrefixKeys(bytes(32), tokens[101:])) == (0, None)


@needs_compiler
def test_edited_texts_get_the_bytes_of_a_server_without_a_cache(tmp_path):
    """`scripts/stress.py edits` checks more of them; XLA decodes the last one."""
    assert [case.problem for case in edits(tmp_path, 51, seed=0)] == [None] * 51
