"""With one process, agreeing is immediate; tests/test_many_processes.py has the rest."""

from simplernn_jax.sharding.agreement import (
    PreemptionSync,
    all_reach,
    barrier,
    broadcast_from_coordinator,
    check_same,
    check_shared,
    coordinator_first,
    is_coordinator,
)


def test_one_process_agrees_with_itself(tmp_path):
    assert is_coordinator()
    barrier("a test")
    assert all_reach("a test", seconds=0)
    check_same("nothing to compare", "text")
    check_shared(str(tmp_path))
    assert not list(tmp_path.iterdir())
    assert broadcast_from_coordinator(17) == 17
    assert coordinator_first("a test", lambda: "result") == "result"


def test_a_signal_stops_one_process_at_once():
    signals = []
    vote = PreemptionSync(lambda: signals[-1] if signals else None)
    assert vote.signal(3) is None
    signals.append("SIGTERM")
    assert vote.signal(3) == "SIGTERM"
