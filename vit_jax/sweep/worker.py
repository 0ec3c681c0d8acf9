"""The loop of a worker: takes what nobody works at, until nothing is left."""

import time
import traceback
from collections.abc import Callable
from typing import NamedTuple

from vit_jax.sweep.store import Store
from vit_jax.sweep.units import Busy

POLL = 0.5  # seconds, where others hold what is left

# What a unit may fail with: a damaged file, a wrong setting, memory, a bug in one protocol.
FAILURES = (
    *(ValueError, OSError, ArithmeticError, ImportError, RuntimeError),
    *(LookupError, TypeError, AttributeError, MemoryError),
)


class Task(NamedTuple):
    """Something to be done once.

    Attributes:
      id: of its lease and its failure.
      done: whether it was.
      run: does it, and may say what that took; raises `Busy` where another worker does a part.
    """

    id: str
    done: Callable[[], bool]
    run: Callable[[], str | None]


def work(
    store: Store,
    list_tasks: Callable[[], tuple[list[Task], bool]],
    *,
    check_stop: Callable[[], None],
    say: Callable[[str], None],
    progress: Callable[[], None] = lambda: None,
    idle: float = POLL,
) -> None:
    """Works until all tasks are done or failed, and no more will come.

    Args:
      store: the leases.
      list_tasks: those there are by now, and whether more may come.
      check_stop: called between tasks; may raise to give up.
      say: prints a line.
      progress: called after each round of tasks.
      idle: seconds to wait where there is nothing to do yet.
    """
    while True:
        tasks, more = list_tasks()
        left = [task for task in tasks if not task.done() and not store.failed(task.id)]
        did = False
        for task in left:
            check_stop()
            did |= _attempt(store, task, say)
        progress()
        if not left and not more:
            return
        if not did:
            check_stop()
            time.sleep(idle)


def _attempt(store: Store, task: Task, say: Callable[[str], None]) -> bool:
    """Does a task, unless another has it or had it; whether anything was done."""
    if task.done() or store.failed(task.id):
        return False
    with store.lease(task.id) as mine:
        if not mine or task.done():
            return False
        start = time.perf_counter()
        try:
            note = task.run()
        except Busy:
            return False
        except FAILURES as error:
            line = " ".join(str(error).split()) or repr(error)
            store.save_failure(task.id, line, traceback.format_exc())
            say(f"failed  {task.id}: {line}")
            return True
        took = f"{time.perf_counter() - start:.1f} s" + (f"; {note}" if note else "")
        say(f"done    {task.id} ({took})")
        return True
