"""The processes of a job: how they start, agree and stop; and the compilation cache."""

import collections
import contextlib
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any, NoReturn, TypeVar

import jax
from jax._src import clusters, distributed  # detection and the key-value store: no public names
from jax.experimental import multihost_utils

from vit_jax.exit_codes import EXIT_LOST

T = TypeVar("T")


class AbsentError(TimeoutError):
    """Another process of the job did not come."""


class Processes:
    """The processes of this job, which agree through JAX's coordination service.

    Every method is called by all of them, in the same order. An error that one meets is told by
    process 0, in one line that names it; the others leave by `SystemExit`.

    Args:
      timeout: seconds to wait for the slowest.

    Attributes:
      index: of this one.
      count: 1 unless `start_processes` found others.
    """

    def __init__(self, *, timeout: float = 300.0):
        state = distributed.global_state
        self.index, self.count, self.timeout = state.process_id, state.num_processes, timeout
        self._client, self._calls = state.client, 0

    @property
    def is_first(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.index == 0

    def gather(self, what: str, value: Any, *, extra: float = 0.0) -> list[Any]:
        """What each process gives as `value` (of JSON), in their order.

        Args:
          what: what they are at, for the message about a process that does not come.
          extra: seconds that some may need beyond the time-out.

        Raises:
          AbsentError: not all came; those who did not are named.
        """
        if self.count == 1:
            return [value]
        self._calls += 1
        folder = f"vit_jax/{self._calls}"
        self._client.key_value_set(f"{folder}/{self.index}", json.dumps(value))
        wait = self.timeout + extra
        try:
            self._client.wait_at_barrier(f"{folder}/all", round(1000 * wait))
        except jax.errors.JaxRuntimeError as error:
            came = {int(key.rsplit("/", 1)[1]) for key, _ in self._client.key_value_dir_get(folder)}
            absent = sorted(set(range(self.count)) - came)
            names = f"process {', '.join(map(str, absent))}" if absent else "another process"
            raise AbsentError(
                f"{names} of {self.count} did not come to {what} within {wait:.0f} s, or ended: "
                "see its log, or give it more time with --start_timeout."
            ) from error
        found = dict(self._client.key_value_dir_get(folder))
        return [json.loads(found[f"{folder}/{index}"]) for index in range(self.count)]

    @contextlib.contextmanager
    def together(self, what: str, *, extra: float = 0.0) -> Iterator[None]:
        """An error of any process inside the block ends all of them."""
        problem = None
        try:
            yield
        except (ValueError, OSError, ImportError) as error:
            problem = error
        found = [None, ""] if problem is None else [str(problem), socket.gethostname()]
        found = self.gather(what, found, extra=extra)
        if all(text is None for text, _ in found):
            return
        if self.is_first and problem is not None:
            raise problem
        index = next(index for index, (text, _) in enumerate(found) if text is not None)
        self._end(f"process {index} ({found[index][1]}): {found[index][0]}")

    def first(self, what: str, action: Callable[[], T], *, extra: float = 0.0) -> T:
        """What `action` gives on process 0, which alone runs it; JSON to the others."""
        answer = None
        with self.together(what, extra=extra):
            if self.is_first:
                answer = action()
        others = self.gather(what, answer if self.count > 1 else None)
        return answer if self.is_first else others[0]

    def publish(self, name: str, value: Any) -> None:
        """Lets process 0 know, without waiting for it or for the others."""
        self._client.key_value_set(f"vit_jax/{name}/{self.index}", json.dumps(value))

    def published(self, name: str) -> dict[int, Any]:
        """What was published under a name up to now, by process."""
        found = self._client.key_value_dir_get(f"vit_jax/{name}")
        return {int(key.rsplit("/", 1)[1]): json.loads(value) for key, value in found}

    def forget(self, name: str) -> None:
        """Deletes what was published under a name."""
        self._client.key_value_delete(f"vit_jax/{name}")

    def check_same(self, facts: Mapping[str, Any]) -> None:
        """Raises ValueError if they are not the same everywhere, naming who differs, and in what.

        Args:
          facts: by a name that a person understands.
        """
        found = self.gather("the comparison", [socket.gethostname(), dict(facts)])
        problems = []
        for name in facts:
            values = [json.dumps(each[1].get(name)) for each in found]
            usual = collections.Counter(values).most_common(1)[0][0]
            others = [index for index, value in enumerate(values) if value != usual]
            problems += [
                f"process {index} ({found[index][0]}) has {name} {values[index]}, "
                f"{self.count - len(others)} of {self.count} have {usual}"
                for index in others[:3]
            ]
        if problems:
            self._end(f"the processes differ: {'; '.join(problems)}; start all of them alike.")

    def _end(self, message: str) -> None:
        if self.is_first:
            raise ValueError(message)
        raise SystemExit(1)


def start_processes(
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    platform: str | None = None,
    start_timeout: float = 300.0,
    heartbeat_timeout: float = 100.0,
) -> Processes:
    """Joins this process to its job: the given one, the cluster's, or one of this process alone.

    TPU pods (also on GKE), SLURM steps and Open MPI are recognised by `jax.distributed`.

    Args:
      coordinator: 'host:port', where process 0 listens; the three go together.
      num_processes: of the job.
      process_id: of this one, from 0.
      platform: 'cpu', 'gpu' or 'tpu' that must be there; None for what JAX finds.
      start_timeout: seconds to wait for the others.
      heartbeat_timeout: seconds after which a silent process counts as dead and the others end.

    Raises:
      ValueError: flags that do not fit together, or no such platform on this machine.
      TimeoutError: the coordinator does not answer.
    """
    _check_flags(coordinator, num_processes, process_id)
    if heartbeat_timeout < 1:  # JAX would abort
        raise ValueError(
            f"--heartbeat_timeout={heartbeat_timeout} must be at least 1 s; there is no turning it "
            "off, the default is 100."
        )
    if platform is not None:
        if platform not in PLATFORMS:
            raise ValueError(f"--platform={platform} must be one of {', '.join(PLATFORMS)}.")
        jax.config.update("jax_platforms", PLATFORMS[platform])
    options = {
        "initialization_timeout": round(start_timeout) + 60,  # after ours, for it aborts
        "heartbeat_timeout_seconds": round(heartbeat_timeout),
    }
    if coordinator is not None:
        if process_id:
            _await_coordinator(coordinator, start_timeout)
        else:
            _check_port_is_free(coordinator)
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            cluster_detection_method="deactivate",
            **options,
        )
    elif (cluster := _cluster()) is not None:
        if cluster.get_process_id():
            _await_coordinator(_address_there(start_timeout), start_timeout)
        jax.distributed.initialize(**options)
    return Processes(timeout=start_timeout)


def who_am_i(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> tuple[int, int]:
    """This process's index and the count of all, before they have met; see `start_processes`."""
    _check_flags(coordinator, num_processes, process_id)
    if coordinator is not None:
        return process_id, num_processes
    cluster = _cluster()
    return (0, 1) if cluster is None else (cluster.get_process_id(), cluster.get_process_count())


def _cluster() -> type[clusters.ClusterEnv] | None:
    """What `jax.distributed` would find; without one it raises."""
    known = clusters.ClusterEnv._cluster_types
    return next((x for x in known if not x.opt_in_only_method and x.is_env_present()), None)


def _address_there(timeout: float) -> str:
    """Where `jax.distributed` would look for process 0 of the cluster's job."""
    given = os.environ.get("JAX_COORDINATOR_ADDRESS")
    detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
    return detect(given, None, None, (), None, round(timeout))[0]


PLATFORMS = {"cpu": "cpu", "gpu": "cuda", "tpu": "tpu"}


def start_devices(platform: str | None) -> dict[str, Any]:
    """Starts JAX's devices; answers what must be the same on all processes.

    Raises:
      ValueError: those that were asked for, by --platform or $JAX_PLATFORMS, are not there.
    """
    asked = PLATFORMS.get(platform, platform) or (jax.config.jax_platforms or "").split(",")[0]
    host = socket.gethostname()
    try:
        devices = jax.local_devices()
    except (RuntimeError, AssertionError) as error:  # the latter where CUDA sees no GPU
        reason = (str(error) or "there is none").splitlines()[0]
        raise ValueError(f"{asked or 'no device'} cannot be used on {host}: {reason}.") from error
    found = devices[0].platform
    if asked and found != {"cuda": "gpu", "rocm": "gpu"}.get(asked, asked):
        raise ValueError(f"{asked} was asked for, and {host} has {found} only.")
    return {"device": f"{found} {devices[0].device_kind}", "number of devices": len(devices)}


def make_stop() -> "StopSignal":
    """What notes that this job is to stop."""
    return AgreedStop() if jax.distributed.is_initialized() else StopSignal()


def until_a_peer_is_lost(processes: Processes, action: Callable[[], int]) -> int:
    """The exit code of `action`, or EXIT_LOST where it fails because another process ended."""
    try:
        return action()
    except AbsentError:
        raise
    except (jax.errors.JaxRuntimeError, OSError) as error:
        # A save or a comparison that another process left unfinished says OSError.
        cause = error.__cause__ if isinstance(error, OSError) else error
        lost = isinstance(cause, jax.errors.JaxRuntimeError)
        if processes.count == 1 or not lost or "memory" in str(error).lower():
            raise
        reason = " ".join(str(error).split())[:300]
        print(f"vit-jax: process {processes.index} lost another: {reason}", file=sys.stderr)
        return EXIT_LOST


def _check_flags(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> None:
    given = (coordinator, num_processes, process_id)
    if given == (None, None, None):
        return
    if None in given:
        raise ValueError("--coordinator, --num_processes and --process_id go together: give all.")
    found = re.fullmatch(r"([^:]+|\[.+\]):(\d+)", coordinator)
    if not found or not 0 < int(found[2]) < 1 << 16:
        raise ValueError(
            f"--coordinator={coordinator} must be host:port, as localhost:1234 or [::1]:1234."
        )
    if not 0 <= process_id < num_processes:
        raise ValueError(
            f"--process_id={process_id} must be at least 0 and less than "
            f"--num_processes={num_processes}."
        )


def _await_coordinator(address: str, timeout: float) -> None:
    """Returns when something listens there: JAX itself would abort after its time-out."""
    host, _, port = address.rpartition(":")
    deadline, reason = time.monotonic() + timeout, "no answer"
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=5):
                return
        except OSError as error:
            reason = error.strerror or str(error)
            time.sleep(0.2)
    raise TimeoutError(
        f"coordinator {address} did not answer within {timeout:.0f} s ({reason}); is process 0 "
        "running there, and is the port open?"
    )


def _check_port_is_free(coordinator: str) -> None:
    """Raises ValueError where something listens on this host already: JAX itself would crash."""
    port = int(coordinator.rpartition(":")[2])
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        raise ValueError(
            f"--coordinator={coordinator}: process 0 cannot listen at port {port} "
            f"({error.strerror}); give all processes another one."
        ) from error


def is_one_of_many() -> bool:
    """Whether this process belongs to a job of several."""
    return distributed.global_state.num_processes > 1


def end_at_once(code: int) -> NoReturn:
    """Ends the process without waiting for anything or anybody but a moment.

    Process 0 holds the coordination service: without it others, which end for the same reason,
    would abort first.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if distributed.global_state.process_id == 0:
        time.sleep(2.0)
    os._exit(code)


class Preempted(Exception):
    """Raised inside an evaluation when the job was asked to stop."""


class StopSignal:
    """Notes SIGTERM and SIGINT, so that the loop can save and end; a second SIGINT ends at once."""

    def __init__(self):
        self.received: int | None = None
        self._previous = {}
        if threading.current_thread() is threading.main_thread():  # elsewhere Python has no say
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def __bool__(self) -> bool:
        return self.received is not None

    def check(self) -> None:
        """Raises `Preempted` if a signal came."""
        if self:
            raise Preempted

    def restore(self) -> None:
        """Gives the signals back to whoever had them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class AgreedStop(StopSignal):
    """A SIGTERM that came to any process of the job, seen by all of them at the same poll.

    `jax.distributed` has the handler: one of Python's, installed later, would take it away. So all
    processes must poll (`if stop`, `stop.check()`) the same number of times.
    """

    def __init__(self):
        self.received: int | None = None
        self._previous, self._polls = {}, 0

    def __bool__(self) -> bool:
        self._polls += 1
        if self.received is None and multihost_utils.reached_preemption_sync_point(self._polls):
            self.received = signal.SIGTERM
        return self.received is not None


def enable_compilation_cache() -> None:
    """Keeps compiled programs in $JAX_COMPILATION_CACHE_DIR or ~/.cache/vit_jax/xla."""
    if jax.config.jax_compilation_cache_dir is None:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(home, "vit_jax", "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
