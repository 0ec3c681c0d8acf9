"""The command `vit-jax`: a table of commands, and what becomes of their errors."""

import contextlib
import importlib.metadata
import logging
import os
import re
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator

from vit_jax.exit_codes import EXIT_PREEMPTED
from vit_jax.spelling import nearest


def _prepare(argv: list[str]) -> int:
    from vit_jax.commands import prepare

    return prepare.main(argv)


def _train(argv: list[str]) -> int:
    with _stoppable():
        from vit_jax.commands import train

        return train.main(argv)


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM ends a training that has not begun to listen for it as it does later."""
    if threading.current_thread() is not threading.main_thread():  # where Python has no say
        yield
        return
    previous = signal.signal(signal.SIGTERM, _stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _stop(number: int, _) -> None:
    os.write(1, f"stopped by signal {number} at the start; the same command goes on.\n".encode())
    os._exit(EXIT_PREEMPTED)


def _launch(argv: list[str]) -> int:
    from vit_jax.commands import launch

    return launch.main(argv)


def _evaluate(argv: list[str]) -> int:
    from vit_jax.commands import evaluate

    return evaluate.main(argv)


def _import(argv: list[str]) -> int:
    from vit_jax.commands import import_

    return import_.main(argv)


def _export(argv: list[str]) -> int:
    from vit_jax.commands import export

    return export.main(argv)


def _inspect(argv: list[str]) -> int:
    from vit_jax.commands import inspect

    return inspect.main(argv)


def _sweep(argv: list[str]) -> int:
    from vit_jax.commands import sweep

    return sweep.main(argv)


def _predict(argv: list[str]) -> int:
    from vit_jax.commands import predict

    return predict.main(argv)


def _embed(argv: list[str]) -> int:
    from vit_jax.commands import embed

    return embed.main(argv)


def _plan(argv: list[str]) -> int:
    from vit_jax.commands import plan

    return plan.main(argv)


def _benchmark(argv: list[str]) -> int:
    from vit_jax.commands import benchmark

    return benchmark.main(argv)


def _report(argv: list[str]) -> int:
    from vit_jax.commands import report

    return report.main(argv)


# Imported when called: `vit-jax --help` need not wait for jax.
COMMANDS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "prepare": (_prepare, "makes a dataset"),
    "train": (_train, "trains a model, or resumes"),
    "launch": (_launch, "starts a training job of many processes, here or elsewhere"),
    "evaluate": (_evaluate, "evaluates a checkpoint"),
    "sweep": (_sweep, "evaluates many checkpoints"),
    "plan": (_plan, "compiles for chips that are not here"),
    "benchmark": (_benchmark, "tells whether a run will wait for its data or for its chips"),
    "import": (_import, "reads weights from elsewhere"),
    "export": (_export, "writes weights for elsewhere"),
    "inspect": (_inspect, "says what is in a checkpoint"),
    "predict": (_predict, "classifies images"),
    "embed": (_embed, "writes features of images"),
    "report": (_report, "draws a run or a sweep"),
}


def check_command(name: str) -> None:
    """Raises ValueError for one that is not there, with what was meant."""
    if name not in COMMANDS:
        raise ValueError(
            f"command {name!r} is unknown{nearest(name, COMMANDS)}; "
            f"choose one of {', '.join(COMMANDS)}."
        )


def main(argv: list[str] | None = None) -> int:
    """Runs a command; an error of the user's becomes one line and exit code 1."""
    code = 1
    try:
        code = _main(argv)
    finally:
        if code not in (0, EXIT_PREEMPTED) and "jax" in sys.modules:
            _end_failed_process(code, sys.exc_info()[1])
    return code


def _end_failed_process(code: int, error: BaseException | None) -> None:
    """One of several does not wait for the others, as it would in Python's orderly end."""
    from vit_jax.runtime import end_at_once, is_one_of_many

    if is_one_of_many():
        if error is not None and not isinstance(error, SystemExit):
            traceback.print_exception(error)
        end_at_once(code)


def _main(argv: list[str] | None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    with_traceback = "--traceback" in argv
    argv = [argument for argument in argv if argument != "--traceback"]
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if argv else 1
    if argv[0] == "--version":
        print(f"vit-jax {importlib.metadata.version('vit-jax')}")
        return 0
    if not with_traceback:
        _quieten()
    try:
        check_command(argv[0])
        return COMMANDS[argv[0]][0](argv[1:])
    except (ValueError, OSError, ArithmeticError, ImportError) as error:
        if with_traceback:
            raise
        return _fail(str(error))
    except RuntimeError as error:
        found = re.search("out of memory.*", str(error), re.IGNORECASE)  # XLA's words, any device
        if with_traceback or not found:
            raise
        return _fail(f"{found[0].lower()}; lower batch_size, or set model.remat to 'full'.")


def _fail(message: str) -> int:
    print(f"vit-jax: {' '.join(message.split())}", file=sys.stderr)
    return 1


def _quieten() -> None:
    """Orbax and TensorStore also print each error that they raise, with tracebacks by the dozen."""
    from absl import logging as absl_logging

    absl_logging.set_verbosity(absl_logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", message="coroutine .* was never awaited")
    sys.unraisablehook = _unraisable


def _unraisable(what) -> None:
    """Passes over what TensorStore says of each write that outlives a failed save."""
    if str(what.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(what)


def _usage() -> str:
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {what}" for name, (_, what) in COMMANDS.items())
    return (
        "usage: vit-jax COMMAND [flags]; `vit-jax COMMAND --help` lists the flags\n\n"
        f"{rows}\n\nAn error is one line; --traceback shows where it came from."
    )


if __name__ == "__main__":
    sys.exit(main())
