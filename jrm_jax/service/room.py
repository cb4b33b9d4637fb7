"""Bytes of decoded pictures that all requests share. Threads and asyncio.

Who finds no room waits; those who wait are served in their order, so that a large group is not
overtaken for ever by small ones.
"""

from __future__ import annotations

import asyncio
import collections
import threading
from concurrent.futures import Future


class Room:
    """`free`: bytes that nobody holds."""

    def __init__(self, total: int):
        self.free = total
        self._waiting: collections.deque[tuple[int, Future]] = collections.deque()
        self._lock = threading.Lock()

    async def take(self, count: int) -> Share:
        """Waits until there is room for `count` bytes, which must be at most all there are. Give
        the share a user (`Share.until`) before anything else is awaited."""
        turn: Future = Future()
        with self._lock:
            self._waiting.append((count, turn))
            self._serve()
        try:
            await asyncio.wrap_future(turn)
        except asyncio.CancelledError:
            self.give(0 if turn.cancel() else count)  # it may have been served meanwhile
            raise
        return Share(self, count)

    def give(self, count: int) -> None:
        """Back."""
        with self._lock:
            self.free += count
            self._serve()

    def _serve(self) -> None:
        while self._waiting:
            count, turn = self._waiting[0]
            if count > self.free and not turn.cancelled():
                return
            self._waiting.popleft()
            if turn.set_running_or_notify_cancel():
                self.free -= count
                turn.set_result(None)


class Share:
    """Bytes that go back when the last work that uses them has ended, or was cancelled before it
    began. A caller who hangs up ends neither a thread nor a call of the device."""

    def __init__(self, room: Room, count: int):
        self._room, self._count, self._users, self._given = room, count, 0, False
        self._lock = threading.Lock()

    def until(self, work: Future) -> None:
        """One more user. From several threads, while another one is at work."""
        with self._lock:
            self._users += 1
        work.add_done_callback(self._ended)

    def _ended(self, _: Future) -> None:
        with self._lock:
            self._users -= 1
            # a thread's work may have ended, with all that it began, before it is a user itself
            last = not self._users and not self._given
            self._given |= last
        if last:
            self._room.give(self._count)
