"""Processes that are killed at what they do: forked from a program without threads, dead before any operation."""

import os
import signal
import sys
import traceback

FILES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir")
"""Operations on files, as Python's audit hooks name them."""


def forked(work) -> int:
    """Start work() in a process of its own."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return pid


def die_at_operation(number: int, watched: tuple[str, ...] = FILES) -> None:
    """Kill this process just before its `number`-th operation of those watched, from now."""
    left = [number]

    def hook(event, _):
        if event in watched:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
