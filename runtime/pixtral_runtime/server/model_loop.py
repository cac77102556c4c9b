"""One thread that owns the scheduler. Everybody else hands it generations, and is told of them from that thread."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue

from pixtral_runtime.errors import InputError, MachineError, PixtralError
from pixtral_runtime.generation.generation import Generation
from pixtral_runtime.generation.scheduler import Scheduler

logger = logging.getLogger(__name__)

Listener = Callable[[Generation], None]
"""Called in the loop's thread after each step that brought tokens, and a last time when `finish_reason` is set."""
MOST_FAILURES = 3  # steps in a row; then nothing will help but another process


class ModelLoop:
    """Steps a scheduler while anything is under way, and sleeps otherwise.

    A step that fails as a whole fails the generations that are under way. Those that come later get a new scheduler.
    `is_alive` is False after several failures in a row, and when the thread has ended.
    """

    def __init__(self, new_scheduler: Callable[[], Scheduler]) -> None:
        self._new_scheduler = new_scheduler
        self.scheduler = new_scheduler()
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._listeners: dict[Generation, Listener] = {}
        self._told: dict[Generation, int] = {}  # tokens
        self._failures = 0
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Finish what is under way, and end the thread."""
        self._inbox.put(self._stop)
        self._thread.join()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and self._failures < MOST_FAILURES

    @property
    def waiting(self) -> int:
        """Generations that have no slot yet."""
        return self._inbox.qsize() + self.scheduler.waiting

    def submit(self, generation: Generation, listener: Listener) -> None:
        self._inbox.put(partial(self._submit, generation, listener))

    def cancel(self, generation: Generation) -> None:
        """Forget it before the next step. Its listener hears nothing more."""
        self._inbox.put(partial(self._cancel, generation))

    # In the thread

    def _run(self) -> None:
        while self.scheduler.busy or not self._is_stopping:
            if not self.scheduler.busy:
                self._inbox.get()()
            while not self._inbox.empty():
                self._inbox.get()()
            if self.scheduler.busy:
                self._step()

    def _stop(self) -> None:
        self._is_stopping = True

    def _submit(self, generation: Generation, listener: Listener) -> None:
        try:
            self.scheduler.submit(generation)
        except InputError as error:
            generation.fail(error)
            listener(generation)
            return
        self._listeners[generation], self._told[generation] = listener, 0

    def _cancel(self, generation: Generation) -> None:
        self.scheduler.cancel(generation)
        self._forget(generation)

    def _step(self) -> None:
        try:
            self.scheduler.step()
            self._failures = 0
        except Exception as error:  # a bug, or a device that is gone: these answers are lost, the server is not
            logger.exception("a step of the model failed")
            self._failures += 1
            known = error if isinstance(error, PixtralError) else MachineError("the model failed", "try again")
            for generation in self._listeners:
                generation.fail(known)
            self.scheduler = self._new_scheduler()
        for generation, listener in list(self._listeners.items()):
            if generation.finish_reason is not None:
                self._forget(generation)
                listener(generation)
            elif len(generation.token_ids) > self._told[generation]:
                self._told[generation] = len(generation.token_ids)
                listener(generation)

    def _forget(self, generation: Generation) -> None:
        self._listeners.pop(generation, None)
        self._told.pop(generation, None)
