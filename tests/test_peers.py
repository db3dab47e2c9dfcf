"""Who sees that another process has ended, and what is said about it."""

import concurrent.futures
import queue
import socket
import time
import types

import pytest

from simplernn_jax.parallel import peers as peers_module
from simplernn_jax.parallel.peers import Lost, Peers
from simplernn_jax.parallel.rendezvous import Member

MEMBERS = [Member(number, f"host{number}", 100 + number) for number in range(3)]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(peers_module, "SILENCE_SECONDS", 0.6)
    monkeypatch.setattr(peers_module, "_BEAT_SECONDS", 0.1)
    monkeypatch.setattr(peers_module, "_OWN_WORDS_SECONDS", 0.3)
    monkeypatch.setattr(peers_module, "_LEAVE_SECONDS", 0.3)


class Run:
    """Three processes; those in `real` watch, of the others the test holds the connection."""

    def __init__(self, *real):
        to_others = {}
        self.ends = {}
        for number in (1, 2):
            to_others[number], self.ends[number] = socket.socketpair()
        self.ends[0] = to_others
        self.lost = {number: queue.Queue() for number in real}
        self.peers = {}
        for number in real:
            connections = to_others if number == 0 else {0: self.ends[number]}
            self.peers[number] = Peers(MEMBERS, number, connections, self.lost[number].put)

    def heard(self, number):
        """Whom a process has lost."""
        return self.lost[number].get(timeout=10)

    def nobody_is_lost(self):
        """Whether a while passes without a loss."""
        time.sleep(1.0)
        return all(lost.empty() for lost in self.lost.values())

    def close(self):
        """Ends all in good order; the ends that a `Peers` holds it closes itself then."""
        for peers in self.peers.values():
            peers.say_bye()
        held = {self.ends[number] for number in (1, 2) if number not in self.peers}
        held |= set() if 0 in self.peers else set(self.ends[0].values())
        for end in held:
            end.close()
        every = [self.ends[1], self.ends[2], *self.ends[0].values()]
        deadline = time.monotonic() + 10
        while any(end.fileno() >= 0 for end in every) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert all(end.fileno() < 0 for end in every)


@pytest.fixture
def run():
    runs = []

    def start(*real):
        runs.append(Run(*real))
        return runs[-1]

    yield start
    for started in runs:
        started.close()


def test_as_long_as_all_live_nothing_happens(run):
    three = run(0, 1, 2)
    assert three.nobody_is_lost()


def test_a_death_is_seen_at_once_and_told_to_all(run):
    three = run(0, 1)
    three.ends[2].close()
    expected = Lost(MEMBERS[2], "died", False)
    assert three.heard(0) == expected
    assert three.heard(1) == expected
    assert str(expected) == "process 2 (host host2, pid 102) died"
    assert three.peers[1].lost == expected


def test_the_death_of_the_first_is_seen_by_all(run):
    three = run(1, 2)
    for end in three.ends[0].values():
        end.close()
    assert {three.heard(1), three.heard(2)} == {Lost(MEMBERS[0], "died", False)}


@pytest.mark.parametrize("silent", [0, 2])
def test_a_process_that_gives_no_sign_of_life_hangs(run, silent):
    alive = [number for number in range(3) if number != silent]
    three = run(*alive)
    for number in alive:
        lost = three.heard(number)
        assert (lost.member, lost.own_words) == (MEMBERS[silent], False)
        assert lost.why.startswith("hangs: no sign of life for")


def test_whoever_was_stopped_itself_does_not_blame_the_others(run, monkeypatch):
    late = [0.0]
    clock = types.SimpleNamespace(monotonic=lambda: time.monotonic() + late[0], sleep=time.sleep)
    monkeypatch.setattr(peers_module, "time", clock)
    three = run(0, 1, 2)
    time.sleep(0.3)
    late[0] = 100.0
    assert three.nobody_is_lost()


def test_an_error_of_one_is_told_in_its_own_words(run):
    three = run(0, 1, 2)
    assert not three.peers[2].say_error("the disk is full")
    expected = Lost(MEMBERS[2], "the disk is full", True)
    assert three.heard(0) == three.heard(1) == expected
    assert str(expected) == "process 2 (host host2, pid 102) ended: the disk is full"
    assert three.nobody_is_lost()


def test_an_error_of_the_first_is_told_before_it_ends(run):
    three = run(0, 1, 2)
    assert not three.peers[0].say_error("the disk is full")
    assert three.heard(1) == three.heard(2) == Lost(MEMBERS[0], "the disk is full", True)


def test_the_same_error_in_all_is_said_by_the_first_alone(run):
    three = run(0, 1)
    three.ends[2].sendall(b'{"bye": "no text"}\n')
    time.sleep(0.1)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first, second = (pool.submit(three.peers[n].say_error, "no text") for n in (0, 1))
    assert (first.result(), second.result()) == (False, True)
    assert three.nobody_is_lost()


def test_whoever_is_done_is_not_missed(run):
    three = run(0, 1, 2)
    for number in (1, 0, 2):
        three.peers[number].say_bye()
    assert three.nobody_is_lost()


def test_a_thread_in_a_hurry_may_ask_whether_the_first_is_gone():
    ours, theirs = socket.socketpair()
    peers = Peers(MEMBERS, 1, {0: ours}, lambda lost: None)
    assert peers.lost_coordinator() is None
    theirs.close()
    lost = peers.lost_coordinator() or peers.lost
    # On a busy machine it may be missed for its silence before its end is seen.
    assert lost is not None
    assert lost.member == MEMBERS[0]
