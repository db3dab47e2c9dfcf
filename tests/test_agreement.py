"""With one process, agreeing is immediate; tests/test_many_processes.py has the rest."""

from simplernn_jax.parallel.agreement import (
    StopVote,
    all_reach,
    check_same,
    check_shared,
    first_then_others,
    from_first,
    is_first,
    wait_for_all,
)


def test_one_process_agrees_with_itself(tmp_path):
    assert is_first()
    wait_for_all("a test")
    assert all_reach("a test", seconds=0)
    check_same("nothing to compare", "text")
    check_shared(str(tmp_path))
    assert not list(tmp_path.iterdir())
    assert from_first(17) == 17
    assert first_then_others("a test", lambda: "result") == "result"


def test_a_signal_stops_one_process_at_once():
    signals = []
    vote = StopVote(lambda: signals[-1] if signals else None)
    assert vote.signal(3) is None
    signals.append("SIGTERM")
    assert vote.signal(3) == "SIGTERM"
