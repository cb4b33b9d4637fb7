"""A save whose writing waits for the test, and then goes on or fails."""

import asyncio
import threading

import pytest
from orbax.checkpoint._src.serialization import jax_array_handlers

PATIENCE = 60  # seconds after which a forgotten gate opens


class Gate:
    """Shut: what is being saved stays unwritten."""

    def __init__(self):
        self._opened, self.reached = threading.Event(), threading.Event()
        self.error = None

    def shut(self):
        self._opened.clear()
        self.reached.clear()

    def open(self, error: Exception | None = None):
        """`error`: what the disk says."""
        self.error = error
        self._opened.set()

    def wait(self):
        self.reached.set()
        self._opened.wait(PATIENCE)
        if self.error is not None:
            raise self.error


def hold(patch: pytest.MonkeyPatch) -> Gate:
    """The gate of all saves from now on; it is shut."""
    gate, write = Gate(), jax_array_handlers._async_serialize_replica_slices

    async def held(*args, **options):
        await asyncio.to_thread(gate.wait)
        return await write(*args, **options)

    patch.setattr(jax_array_handlers, "_async_serialize_replica_slices", held)
    return gate


@pytest.fixture
def gate(monkeypatch):
    gate = hold(monkeypatch)
    gate.open()
    yield gate
    gate.open()
