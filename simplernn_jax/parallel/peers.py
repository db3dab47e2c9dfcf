"""Sees when another process of the run dies, hangs or ends with an error, and says which.

Every process has a connection to process 0 (`rendezvous`), on which both sides send a line every
second: an empty one is a sign of life, the others are JSON. Process 0 judges and tells the rest:

    {"lost": 3, "why": "died", "own_words": false}      whoever reads it cannot go on
    {"bye": "the disk is full"}                         the sender ends, with this error or null

JAX would notice too, later, and abort without a name. A process of which only the main thread
hangs is alive to both.
"""

import contextlib
import json
import selectors
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from simplernn_jax.parallel.rendezvous import Member

SILENCE_SECONDS = 15.0
"""A process that gives no sign of life for so long counts as hanging."""

_BEAT_SECONDS = 1.0
_OWN_WORDS_SECONDS = 1.0
"""How long a process waits for its own error when another has ended with one: most errors, like
one in the configuration, come to all."""
_LEAVE_SECONDS = 3.0
"""How long process 0 lets the others end before itself: JAX aborts them when it is gone."""


class Lost(NamedTuple):
    """Who ended, and how."""

    member: Member
    why: str
    own_words: bool
    """Whether `why` is its own error message."""

    def __str__(self) -> str:
        why = f"ended: {self.why}" if self.own_words else self.why
        return f"{self.member} {why}"


class Peers:
    """Watches the other processes, from its making on, in a thread of its own.

    Args:
      members: all processes of the run, by number.
      number: this one's.
      connections: as from `rendezvous.meet`.
      on_lost: called once, in another thread, when this process cannot go on since another has
        ended; it must end this process.
    """

    def __init__(
        self,
        members: list[Member],
        number: int,
        connections: dict[int, socket.socket],
        on_lost: Callable[[Lost], None],
    ) -> None:
        self.lost: Lost | None = None
        """Whom this process has lost, once it has."""
        self._members = members
        self._number = number
        self._on_lost = on_lost
        self._connections = dict(connections)
        self._heard = dict.fromkeys(connections, time.monotonic())
        self._unread = dict.fromkeys(connections, b"")
        self._last_words: dict[int, str] = {}
        self._ending = threading.Event()
        self._selector = selectors.DefaultSelector()
        for peer, connection in connections.items():
            connection.setblocking(False)
            self._selector.register(connection, selectors.EVENT_READ, peer)
        threading.Thread(target=self._watch, name="peers", daemon=True).start()

    def say_bye(self) -> None:
        """This process is done, in good order; from now on it does not matter who else ends."""
        self._ending.set()
        self._tell_all({"bye": None})

    def say_error(self, error: str) -> bool:
        """This process ends, with an error of its own; now the others end too.

        Returns:
          Whether process 0, not this one, ends with the same: it need not be said twice.
        """
        self._ending.set()
        if self._number == 0:
            self._tell_all({"lost": 0, "why": error, "own_words": True})
            self.let_the_others_end()
            return False
        self._tell_all({"bye": error})
        return _wait_until(lambda: self._last_words.get(0) == error, 2 * _OWN_WORDS_SECONDS)

    def let_the_others_end(self) -> None:
        """On process 0, waits until all have gone, for a few seconds at most."""
        if self._number == 0:
            _wait_until(lambda: not self._connections, _LEAVE_SECONDS)

    def lost_coordinator(self) -> Lost | None:
        """Process 0, if it died just now and the watching thread does not know yet."""
        connection = self._connections.get(0)
        if connection is None:
            return None

        def has_ended() -> bool:
            try:
                return not connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            except OSError as error:
                return not isinstance(error, BlockingIOError)

        return Lost(self._members[0], "died", False) if _wait_until(has_ended, 1.0) else None

    def _watch(self) -> None:
        next_beat = last_time = time.monotonic()
        while self._connections:
            now = time.monotonic()
            if now - last_time > SILENCE_SECONDS / 3:  # this process itself was stopped for a while
                self._heard = dict.fromkeys(self._connections, now)
            last_time = now
            if now >= next_beat:
                next_beat = now + _BEAT_SECONDS
                self._tell_all(None)
                self._look_for_silence(now)
            for key, _ in self._selector.select(max(next_beat - time.monotonic(), 0.0)):
                self._hear(key.data)

    def _look_for_silence(self, now: float) -> None:
        for peer in self._connections:
            if now - self._heard[peer] > SILENCE_SECONDS:
                why = f"hangs: no sign of life for {SILENCE_SECONDS:.0f} s"
                self._lose(Lost(self._members[peer], why, False))

    def _hear(self, peer: int) -> None:
        try:
            received = self._connections[peer].recv(65536)
        except BlockingIOError:
            return
        except OSError:
            received = b""
        if not received:
            self._lose(Lost(self._members[peer], "died", False))
            self._forget(peer)
            return
        self._heard[peer] = time.monotonic()
        *lines, self._unread[peer] = (self._unread[peer] + received).split(b"\n")
        for line in filter(None, lines):
            self._obey(peer, json.loads(line))

    def _obey(self, peer: int, message: dict[str, Any]) -> None:
        if "lost" in message:
            number, why, own_words = message["lost"], message["why"], message["own_words"]
            self._last_words[number] = why
            self._lose(Lost(self._members[number], why, own_words))
        elif message["bye"] is not None:
            self._lose(Lost(self._members[peer], message["bye"], True))
        else:
            self._forget(peer)

    def _lose(self, lost: Lost) -> None:
        if self.lost is None:
            self.lost = lost
            if self._number == 0:
                number = lost.member.number
                self._tell_all({"lost": number, "why": lost.why, "own_words": lost.own_words})
            threading.Thread(target=self._end, args=(lost,), daemon=True).start()

    def _end(self, lost: Lost) -> None:
        if lost.own_words:
            self._ending.wait(_OWN_WORDS_SECONDS)
        if not self._ending.is_set():
            self._on_lost(lost)

    def _forget(self, peer: int) -> None:
        connection = self._connections.pop(peer)
        self._selector.unregister(connection)
        connection.close()

    def _tell_all(self, message: dict[str, Any] | None) -> None:
        line = b"\n" if message is None else json.dumps(message).encode() + b"\n"
        for connection in list(self._connections.values()):
            with contextlib.suppress(OSError):  # gone, or it hangs: that will show
                connection.send(line)


def _wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether the condition holds within so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
