"""What ends a run from outside: Ctrl-C, SIGTERM, SIGHUP, or an output that nobody reads any more.

    end_at_once   while Python imports torch nothing is there to lose: one line, and the process ends
    Stops         while a run is prepared, `Stopped` is raised where the process happens to be, and what was begun is
                  taken back; once it trains (`deferred`), the stop waits for the next `check`, where the state is whole

The second signal ends the process in any case. Nothing heavy is imported here: the first one may come in the first
second.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

T = TypeVar("T")

# Windows has no SIGHUP
NUMBERS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Stopped(KeyboardInterrupt):
    """A run has to end. The message is one line: why, and what is left of it. status: the process's exit status."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class Stops:
    """The first stop that came, raised where it comes or, if `deferred`, by `check`.

    before: what to say of a run that had not begun to train when it was stopped.
    """

    used = False  # whether this process came as far as a run
    told = False  # whether it has said why it ends

    def __init__(self, before: str):
        self.before, self.deferred = before, False
        self.first: Stopped | None = None

    def note(self, why: str, status: int = 1) -> None:
        """Something wants the run to end."""
        self.first = self.first or Stopped(f"{why}: {self.before}", status)
        if not self.deferred:
            self.check()

    def check(self) -> None:
        """Raises Stopped if a stop came."""
        if self.first is not None:
            raise self.first

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Inside the `with` block the first signal is noted; the second finds the handlers that were there before."""

        def note(number: int, frame) -> None:
            put_back()
            self.note(f"stopped by {signal.Signals(number).name}", 128 + number)

        Stops.used = True
        with _handled(note) as put_back:
            try:
                yield
            except Exception:  # a compiled module that is being imported makes an ImportError of Stopped
                if not self.deferred:
                    self.check()
                raise


def end_at_once() -> None:
    """From now on a signal ends the process where it stands, with one line. An exception would not do: modules that are
    being imported catch it, and go on or make another of it.
    """

    def end(number: int, frame) -> None:
        with suppress(OSError):
            state = "" if Stops.used else ": nothing was begun"
            if not Stops.told:
                os.write(2, f"\nfastlm: stopped by {signal.Signals(number).name}{state}\n".encode())
        os._exit(128 + number)

    for number in _ours():
        signal.signal(number, end)


def awake(work: Callable[[], T]) -> T:
    """work(), in another thread: this one stays awake for signals, which compiled code holds off until it returns."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)  # a daemon: the process may end before it does
    thread.start()
    while thread.is_alive():
        thread.join(0.1)  # on Windows, signals are heard between two waits
    for error in errors:
        raise error
    return results[0]


@contextmanager
def _handled(handler: Callable) -> Iterator[Callable[[], None]]:
    """Inside the `with` block `handler` gets the signals; yields what puts the handlers of before back."""
    before = {number: signal.getsignal(number) for number in _ours()}

    def put_back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in before:
        signal.signal(number, handler)
    try:
        yield put_back
    finally:
        put_back()


def _ours() -> list[int]:
    """The signals to handle: none outside the main thread, which alone may; no SIGHUP under nohup; none that another
    language handles.
    """
    if threading.current_thread() is not threading.main_thread():
        return []
    handlers = {number: signal.getsignal(number) for number in NUMBERS}
    nohup = {number for number in NUMBERS if number != signal.SIGINT and handlers[number] is signal.SIG_IGN}
    return [number for number in NUMBERS if handlers[number] is not None and number not in nohup]
