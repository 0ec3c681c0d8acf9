import builtins
import contextlib
import json
import math
import types

import jax.numpy as jnp
import pytest
from etils import epath
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st

from tests.runs import assert_board_shows, board_values, rows
from vit_jax import metrics as metrics_lib
from vit_jax.metrics import MetricsWriter, Monitor, Stopwatch, duration, mfu, read_rows


@pytest.fixture
def clock(monkeypatch):
    """A Stopwatch on a time that only the test moves: `clock.pass_(seconds)`."""
    now = [1000.0]
    monkeypatch.setattr(metrics_lib.time, "time", lambda: now[0])
    clock = Stopwatch(now[0])
    clock.pass_ = lambda seconds: now.__setitem__(0, now[0] + seconds)
    return clock


def write(workdir, steps, resume_step=0):
    writer = MetricsWriter(epath.Path(workdir), resume_step=resume_step)
    for step in steps:
        writer.write(step, {"train/loss": 1 / step})
    writer.close()


def test_rows_after_the_checkpoint_are_cut_off_everywhere(tmp_path):
    write(tmp_path, range(1, 6))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "train/lo')  # a kill came
    assert [row["step"] for row in read_rows(epath.Path(tmp_path) / "metrics.jsonl")] == [
        *range(1, 6)
    ]
    write(tmp_path, [4, 5, 6, 7], resume_step=3)
    assert [row["step"] for row in rows(tmp_path)] == [*range(1, 8)]
    assert_board_shows(tmp_path)
    assert {step for step, _ in board_values(tmp_path)} == set(range(1, 8))


def test_a_fresh_start_leaves_nothing_of_an_old_one(tmp_path):
    write(tmp_path, [1, 2])
    write(tmp_path, [], resume_step=0)
    assert rows(tmp_path) == []
    assert board_values(tmp_path) == {}


def test_what_is_not_finite_is_null(tmp_path):
    writer = MetricsWriter(epath.Path(tmp_path))
    writer.write(3, {"a": math.nan, "b": math.inf, "c": 0.25, "d": 7})
    writer.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    (row,) = rows(tmp_path)
    assert {key: row[key] for key in "abcd"} == {"a": None, "b": None, "c": 0.25, "d": 7}
    assert board_values(tmp_path) == {(3, "c"): 0.25, (3, "d"): 7.0}


def test_floats_come_back_from_the_file_bit_for_bit(tmp_path):
    value = float(jnp.float32(0.1) / 3)
    writer = MetricsWriter(epath.Path(tmp_path))
    writer.write(1, {"a": value})
    writer.close()
    assert rows(tmp_path)[0]["a"] == value


class Bucket(MemoryFileSystem):
    """As gcsfs opens what is to be added to."""

    protocol = "gs"

    def open(self, path, mode="rb", **options):
        return super().open(path, mode.replace("a", "w"), **options)


def test_a_bucket_keeps_the_rows_of_earlier_starts(monkeypatch):
    monkeypatch.setattr(backend.fsspec_backend, "fs", lambda path: Bucket())
    board = types.SimpleNamespace(add_scalar=lambda *_, **__: None, close=lambda: None)
    monkeypatch.setattr("vit_jax.metrics.SummaryWriter", lambda *_, **__: board)
    workdir = epath.Path("gs://bucket/run")
    for start in range(3):
        writer = MetricsWriter(workdir, resume_step=start)
        for step in (start + 1, start + 2):
            writer.write(step, {"a": start})
            assert read_rows(writer.path)[-1]["step"] == step  # a kill takes none of them away
        writer.close()
    found = {row["step"]: row["a"] for row in read_rows(workdir / "metrics.jsonl")}
    assert found == {1: 0, 2: 1, 3: 2, 4: 2}


def test_without_wandb_the_extra_is_named(tmp_path, monkeypatch):
    real = builtins.__import__

    def missing(name, *rest, **kwargs):
        if name == "wandb":
            raise ImportError("No module named 'wandb'")
        return real(name, *rest, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"needs: pip install 'vit-jax\[wandb\]'$"):
        MetricsWriter(epath.Path(tmp_path), wandb="mine")


def test_wandb_gets_the_rows_of_a_run_that_it_knows_again(tmp_path, monkeypatch):
    started, logged = [], []

    def init(**options):
        started.append(options)
        log = lambda row, step: logged.append((step, row))  # noqa: E731
        return types.SimpleNamespace(log=log, finish=lambda: logged.append("finished"))

    monkeypatch.setitem(__import__("sys").modules, "wandb", types.SimpleNamespace(init=init))
    for step in (1, 2):
        writer = MetricsWriter(
            epath.Path(tmp_path), wandb="mine", config={"seed": 0}, resume_step=1
        )
        writer.write(step, {"train/loss": 0.5, "speed/mfu": math.nan})
        writer.close()
    assert logged == [(1, {"train/loss": 0.5}), "finished", (2, {"train/loss": 0.5}), "finished"]
    assert started[0] == started[1]
    assert started[0]["project"] == "mine" and started[0]["resume"] == "allow"


@given(
    st.lists(
        st.tuples(st.sampled_from(Stopwatch.NAMES[:-1]), st.floats(0, 1e4, allow_nan=False)),
        max_size=20,
    ),
    st.floats(-50, 1e4),
)
def test_a_stopwatch_adds_up_to_the_wall_time(parts, lost):
    now = [5000.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics_lib.time, "time", lambda: now[0])
        clock = Stopwatch(now[0])
        clock.resume({"steps": 7.0, "lost": 2.0}, since=now[0] - lost)
        wanted = dict.fromkeys(Stopwatch.NAMES, 0.0) | {"steps": 7.0, "lost": 2.0 + max(lost, 0)}
        for name, seconds in parts:
            with clock(name):
                now[0] += seconds
            wanted[name] += seconds
        assert clock.snapshot() == pytest.approx(wanted, abs=1e-6)
        total = now[0] - 5000.0 + 9.0 + max(lost, 0)
        assert sum(clock.snapshot().values()) == pytest.approx(total, abs=1e-6)


def test_nested_names_run_one_at_a_time(clock):
    clock.switch("steps")
    with pytest.raises(KeyError), clock("evaluation"):
        clock.pass_(2)
        with clock("data_wait"):
            clock.pass_(3)
        clock.pass_(4)
        raise KeyError
    clock.pass_(5)
    seconds = clock.snapshot()
    assert (seconds["steps"], seconds["evaluation"], seconds["data_wait"]) == (5, 6, 3)


def test_waiting_for_items_is_counted(clock):
    clock.switch("steps")

    def items():
        for item in range(3):
            clock.pass_(2)
            yield item
        clock.pass_(1)

    for _ in clock.waiting(items()):
        clock.pass_(10)
    assert clock.snapshot()["data_wait"] == 7
    assert clock.snapshot()["steps"] == 30


@pytest.fixture
def monitor(clock, tmp_path):
    """A Monitor of ten steps of 64 images, whose lines are kept in `monitor.lines`."""
    lines = []
    clock.switch("steps")
    writer = MetricsWriter(epath.Path(tmp_path))
    monitor = Monitor(
        writer,
        clock,
        batch_size=64,
        total_steps=10,
        log_every=2,
        flops_per_image=10**9,
        max_skips=1,
        last_good=lambda: "runs/x/checkpoints/4",
        say=lines.append,
    )
    monitor.lines = lines
    yield monitor
    writer.close()


def metrics_of(step, finite=True, rejected=0):
    values = {"loss": step / 4, "learning_rate": 1e-3, "grad_norm": 2.0, "finite": finite}
    values |= {"update_norm": 0.1, "rejected": rejected}  # counted over all processes
    return {name: jnp.asarray(value) for name, value in values.items()}


@pytest.mark.parametrize("kind, end", [("cpu", ""), ("TPU v4", " | MFU 3.9%")])
def test_a_line_says_what_a_person_wants_to_know(monitor, clock, monkeypatch, kind, end, tmp_path):
    device = types.SimpleNamespace(device_kind=kind)
    monkeypatch.setattr(metrics_lib.jax, "devices", lambda: [device] * 3)
    for step in range(1, 5):
        with clock("data_wait"):
            clock.pass_(0.0005)
        clock.pass_(0.0015)
        monitor.push(step, metrics_of(step))
    monitor.flush()
    assert monitor.lines == [
        "step  2/10 | loss 0.5000 | lr 1.00e-03 | 32,000 images/s | left 0:00 | data wait 25%"
        + end,
        # Steps are read one late, but the last one at once.
        "step  4/10 | loss 1.0000 | lr 1.00e-03 | 64,000 images/s | left 0:00 | data wait 25%"
        + end.replace("3.9", "7.8"),
    ]
    first, second = rows(tmp_path)
    assert first["step"] == 2 and second["step"] == 4
    assert first["train/loss"] == 0.5
    assert first["speed/data_wait"] == pytest.approx(0.25)
    assert first.get("speed/mfu", 0) == (pytest.approx(32_000 * 1e9 / (3 * 275e12)) if end else 0)


def test_speed_leaves_out_saving_but_the_time_left_does_not(monitor, clock, tmp_path):
    monitor.push(1, metrics_of(1))
    for step in range(2, 6):
        clock.pass_(1)
        with clock("saving"):
            clock.pass_(3)
        monitor.push(step, metrics_of(step))
    second = rows(tmp_path)[1]
    assert second["step"] == 4
    assert second["speed/images_per_second"] == pytest.approx(64)
    assert second["speed/seconds_left"] == pytest.approx(6 * 4)


def test_an_unreadable_image_is_named_once_and_counted_each_time(monitor, tmp_path):
    monitor.push(1, metrics_of(1, rejected=1), ["", "example 3: cut"])
    monitor.push(2, metrics_of(2, rejected=2), ["example 3: cut", "example 5: empty"])
    monitor.push(3, metrics_of(3, rejected=1), ["example 5: empty"])  # belongs to a later row
    named = [line for line in monitor.lines if line.startswith("unreadable")]
    assert named == [
        f"unreadable image, left out: example {what}" for what in ("3: cut", "5: empty")
    ]
    (row,) = rows(tmp_path)
    assert row["step"] == 2 and row["train/rejected"] == 3
    monitor.flush()
    assert monitor.rejected == 4


def test_updates_that_are_not_finite_are_counted_and_then_end_the_run(monitor, tmp_path):
    monitor.push(1, metrics_of(1, finite=False))
    monitor.push(2, metrics_of(2))
    assert monitor.lines == [
        "step 1 is not finite (loss 0.25, grad norm 2.0): update skipped, 1 of at most 1"
    ]
    monitor.push(3, metrics_of(3, finite=False))
    with pytest.raises(
        FloatingPointError, match="step 3 is not finite .*checkpoints/4 is the last"
    ):
        monitor.flush()
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["train/skipped"] == 1


def test_a_broken_update_of_whole_gradients_is_never_skipped_over(monitor):
    monitor.push(1, metrics_of(1, finite=False) | {"update_norm": jnp.float32(jnp.nan)})
    with pytest.raises(FloatingPointError, match="step 1 is not finite"):
        monitor.flush()


def test_the_last_step_is_logged_whatever_the_cadence(monitor, tmp_path):
    monitor._log_every = 7
    for step in range(1, 11):
        monitor.push(step, metrics_of(step))
    monitor.flush()
    assert [row["step"] for row in rows(tmp_path)] == [7, 10]


def test_mfu_is_the_share_of_all_devices_peak():
    v4 = types.SimpleNamespace(device_kind="TPU v4")
    assert mfu(275e12, [v4]) == 1.0
    assert mfu(275e12, [v4] * 4) == 0.25
    assert mfu(275e12, [types.SimpleNamespace(device_kind="a toaster")]) is None


@pytest.mark.parametrize(
    "seconds, text",
    [(0, "0:00"), (7.4, "0:07"), (59.6, "1:00"), (723, "12:03"), (11523, "3:12:03")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_a_full_disk_is_told_in_one_line(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer._file.close()
    with open("/dev/full", "w") as writer._file:
        with pytest.raises(OSError, match=r"metrics.jsonl cannot be written \(No space left"):
            writer.write(1, {"x": 1.0})
        with contextlib.suppress(OSError):
            writer._file.close()
