"""Who hangs is named, and who is slow."""

import json
import threading
import time
import types

import pytest
from etils import epath

from vit_jax import watchdog as watchdog_lib
from vit_jax.exit_codes import EXIT_LOST
from vit_jax.watchdog import WINDOW, Stragglers, Watchdog, slow_ones


def processes(index=0, count=3):
    return types.SimpleNamespace(index=index, count=count, is_first=index == 0)


@pytest.fixture
def ended(monkeypatch):
    """Exit codes of a process that would have ended."""
    codes, over = [], threading.Event()
    monkeypatch.setattr(watchdog_lib, "SETTLE", 0.2)
    monkeypatch.setattr(watchdog_lib, "end_at_once", lambda code: (codes.append(code), over.set()))
    return types.SimpleNamespace(codes=codes, over=over)


def test_a_hang_is_written_down_and_the_absent_are_named(tmp_path, ended, capsys):
    for index, age in ((0, 60), (1, -60), (2, 60)):  # those of an earlier start do not count
        (tmp_path / f"{index:03}").mkdir()
        report = {"time": time.time() - age, "step": 3}
        (tmp_path / f"{index:03}" / "hang.json").write_text(json.dumps(report))
    with Watchdog(epath.Path(tmp_path), index=0, count=3, timeout=0.5) as watchdog:
        assert not (tmp_path / "000" / "hang.json").exists()
        watchdog.beat(step=7, positions=[112, 115], phase="training")
        assert ended.over.wait(10)
    assert ended.codes == [EXIT_LOST]
    report = json.loads((tmp_path / "000" / "hang.json").read_text())
    assert (report["step"], report["positions"], report["phase"]) == (7, [112, 115], "training")
    assert "test_a_hang_is_written_down" in (tmp_path / "000" / "stacks.txt").read_text()
    (line,) = capsys.readouterr().err.splitlines()
    assert "nothing went on for 0 s (last: step 7, training); process 2 wrote nothing" in line


def test_a_storage_that_hangs_holds_up_no_end(tmp_path, ended, monkeypatch, capsys):
    monkeypatch.setattr(watchdog_lib, "STORAGE", 0.2)
    answers = threading.Event()
    monkeypatch.setattr(Watchdog, "_write", lambda self: answers.wait(10))
    with Watchdog(epath.Path(tmp_path), timeout=0.2):
        assert ended.over.wait(5)
    assert ended.codes == [EXIT_LOST]
    assert f"went on for 0 s; {tmp_path} does not answer; ending" in capsys.readouterr().err
    answers.set()


@pytest.mark.parametrize("timeout", [0.0, 1.0])
def test_a_loop_that_beats_or_is_over_is_left_alone(tmp_path, ended, timeout):
    with Watchdog(epath.Path(tmp_path), timeout=timeout) as watchdog:
        for _ in range(15):
            watchdog.beat(step=1)
            assert not ended.over.wait(0.1)
    assert not ended.over.wait(1.5)
    with pytest.raises(ValueError, match="--hang_timeout=-1 must not be negative"):
        Watchdog(epath.Path(tmp_path), timeout=-1)


@pytest.mark.parametrize("usual, inside", [(0.5, 30.0), (0.0, 30.0), (30.0, 0.0)])
def test_what_cannot_beat_has_a_time_of_its_own(tmp_path, ended, usual, inside):
    with Watchdog(epath.Path(tmp_path), timeout=usual) as watchdog:
        with watchdog.within(inside, phase="waiting"):
            assert not ended.over.wait(1.0)
        assert ended.over.wait(3.0) == (usual == 0.5)


def test_who_waits_too_long_inside_is_ended(tmp_path, ended, capsys):
    watchdog = Watchdog(epath.Path(tmp_path), timeout=30.0)
    with watchdog, watchdog.within(0.5, phase="waiting for all processes"):
        assert ended.over.wait(5)
    assert "(last: waiting for all processes); all wrote to" in capsys.readouterr().err


@pytest.mark.parametrize(
    "seconds, slow",
    [
        ([0.01, 0.01, 0.031, 0.012], [2]),
        ([0.01, 0.01, 0.029, 0.012], []),
        ([0.001, 0.001, 0.004, 0.001], []),  # nobody waits for three milliseconds
        ([0.2, 0.01], [0]),  # of two, too
    ],
)
def test_who_takes_three_times_as_long_is_slow(seconds, slow):
    lines = slow_ones({index: ("host", value) for index, value in enumerate(seconds)})
    assert [int(line.split()[1]) for line in lines] == slow


def test_slow_ones_are_known_soon_after_a_window():
    store: dict[str, dict[int, list]] = {}

    def process(index):
        made = processes(index, count=2)
        made.publish = lambda name, value: store.setdefault(name, {}).update({index: value})
        made.published = lambda name: store.get(name, {})
        made.forget = store.pop
        return Stragglers(made)

    fast, slow = process(0), process(1)
    told = []
    for step in range(1, 51):
        told += [(step, line) for line in fast.push(0.01)]
        slow.push(0.05)
    assert [step for step, _ in told] == [WINDOW + 1, 2 * WINDOW + 1]
    assert "process 1" in told[0][1] and "50.0 ms a step, the median is 10.0 ms" in told[0][1]
