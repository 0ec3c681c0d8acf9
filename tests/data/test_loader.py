import functools
import hashlib
import io
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vit_jax.data import loader as loader_module
from vit_jax.data.augment import make_augmentation
from vit_jax.data.loader import Loader, each_once, make_eval_loader, make_loader
from vit_jax.data.order import global_order

NUM_EXAMPLES, BATCH, NUM_STEPS = 50, 16, 10  # three epochs and a bit; no epoch ends with a batch


def picture(number: int) -> bytes:
    rng = np.random.default_rng(number)
    stream = io.BytesIO()
    coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8))
    coarse.resize((20 + number % 7, 22)).save(stream, "JPEG" if number % 2 else "PNG")
    return stream.getvalue()


RECORDS = [{"image": picture(number), "label": number % 10} for number in range(NUM_EXAMPLES)]
CROP = make_augmentation(name="inception_crop_flip", size=(12, 16))
PAD = make_augmentation(name="pad_crop_flip", size=(12, 16), padding=2)


def training(
    records=RECORDS, *, seed=0, batch_size=BATCH, num_steps=NUM_STEPS, **options
) -> Loader:
    order = functools.partial(global_order, num_examples=len(records), seed=seed)
    options = {"augment": CROP} | options
    return Loader(
        records, order=order, seed=seed, batch_size=batch_size, num_steps=num_steps, **options
    )


def evaluation(records=RECORDS, *, batch_size=BATCH, **options) -> Loader:
    return Loader(
        records,
        order=functools.partial(each_once, num_examples=len(records)),
        augment=make_augmentation(name="resize_center_crop", size=(12, 16)),
        seed=0,
        batch_size=batch_size,
        num_steps=-(-len(records) // batch_size),
        **options,
    )


def read(loader: Loader) -> list[dict[str, np.ndarray]]:
    with loader:
        return list(loader)


def digests(*processes: list[dict[str, np.ndarray]]) -> list[str]:
    """One for each step, over the batch that the processes' parts make."""
    return [
        hashlib.sha256(
            b"".join(
                np.concatenate([part[name] for part in parts]).tobytes()
                for name in ("image", "label", "mask", "position", "index")
            )
        ).hexdigest()
        for parts in zip(*processes, strict=True)
    ]


@pytest.fixture(scope="module", params=[CROP, PAD], ids=["inception_crop_flip", "pad_crop_flip"])
def reference(request):
    """A recipe, and the digests of its batches from one process with one thread."""
    return request.param, digests(read(training(augment=request.param, num_threads=1)))


def test_batches_are_the_same_for_any_number_of_processes(reference):
    augment, expected = reference
    for process_count in (2, 4):
        parts = [
            read(training(augment=augment, slots=slots))
            for slots in np.split(np.arange(BATCH), process_count)
        ]
        assert parts[0][0]["image"].shape == (BATCH // process_count, 12, 16, 3)
        assert digests(*parts) == expected


def test_batches_are_the_same_wherever_reading_starts(reference):
    augment, expected = reference
    assert len(set(expected)) == NUM_STEPS
    for start in (1, 3, 4, 9, 10):
        batches = read(training(augment=augment, start_step=start))
        assert digests(batches) == expected[start:]


def test_batches_are_the_same_for_any_number_of_threads(reference):
    augment, expected = reference
    for options in ({"num_threads": 5}, {"prefetch": 1}, {"prefetch": 7, "num_threads": 2}):
        assert digests(read(training(augment=augment, **options))) == expected


def test_batches_are_the_same_from_workers_also_after_a_restart(data_dir):
    """One test for several claims, because it takes two seconds to start a worker."""
    with training(augment=CROP, num_workers=4) as loader:
        batches = list(itertools.islice(loader, NUM_STEPS))  # over three epochs
        kept = batches[0]["image"][1:3]
        content = kept.copy()
    expected = digests(read(training(augment=CROP)))
    assert digests(batches) == expected
    del batches
    np.testing.assert_array_equal(kept, content)  # also after the workers are gone
    digits = {"name": "digits", "data_dir": data_dir, "augment": PAD}
    run = {"batch_size": 256, "seed": 0, "num_steps": 7}  # over the end of the first epoch
    halves = [
        read(
            make_loader(
                **digits, **run, num_workers=2, start_step=3, slots=range(128 * at, 128 * at + 128)
            )
        )
        for at in range(2)
    ]
    assert digests(*halves) == digests(read(make_loader(**digits, **run)))[3:]
    assert not multiprocessing.active_children()


def test_another_seed_gives_other_batches():
    first, second = (digests(read(training(seed=seed, num_steps=2))) for seed in (0, 1))
    assert not set(first) & set(second)


def test_the_slots_are_the_positions_of_the_stream():
    batches = read(training())
    positions = np.concatenate([batch["position"] for batch in batches])
    np.testing.assert_array_equal(positions, np.arange(NUM_STEPS * BATCH))
    indices = np.concatenate([batch["index"] for batch in batches])
    for epoch in range(3):
        in_epoch = indices[epoch * NUM_EXAMPLES : (epoch + 1) * NUM_EXAMPLES]
        assert sorted(in_epoch) == list(range(NUM_EXAMPLES))
    labels = np.concatenate([batch["label"] for batch in batches])
    np.testing.assert_array_equal(labels, indices % 10)


def test_an_example_is_augmented_anew_in_every_epoch():
    batches = read(training())
    images = np.concatenate([batch["image"] for batch in batches])
    indices = np.concatenate([batch["index"] for batch in batches])
    first, second, *_ = np.flatnonzero(indices == 7)
    assert (images[first] != images[second]).any()


def test_a_batch_is_arrays_of_the_promised_types():
    batch = read(training(num_steps=1))[0]
    assert {name: (value.dtype.kind, value.dtype.itemsize) for name, value in batch.items()} == {
        "image": ("u", 1),
        "label": ("i", 4),
        "mask": ("b", 1),
        "position": ("i", 8),
        "index": ("i", 8),
        "error": ("U", 4),
    }
    assert batch["mask"].all()
    assert all(len(value) == BATCH for value in batch.values())


@pytest.mark.parametrize("process_count", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [4, 16, 48, 64])
def test_an_evaluation_sees_every_example_once(batch_size, process_count):
    parts = [
        read(evaluation(batch_size=batch_size, slots=slots))
        for slots in np.split(np.arange(batch_size), process_count)
    ]
    assert {len(batches) for batches in parts} == {-(-NUM_EXAMPLES // batch_size)}
    batches = [batch for batches in parts for batch in batches]
    indices, mask, images, labels = (
        np.concatenate([batch[name] for batch in batches])
        for name in ("index", "mask", "image", "label")
    )
    assert sorted(indices[mask]) == list(range(NUM_EXAMPLES))
    assert (indices[~mask] == -1).all()
    assert not images[~mask].any()
    assert not labels[~mask].any()
    assert not any(batch["error"].any() for batch in batches)


def damaged() -> list[dict]:
    records = [dict(record) for record in RECORDS]
    records[3]["image"] = records[3]["image"][:200]
    records[3]["filename"] = b"cat/0003.jpg"
    records[20]["image"] = b"not an image at all"
    return records


class Unreadable(list):
    """A source whose records 5 and 6 lie on a bad disk."""

    def __getitem__(self, index):
        if index in (5, 6):
            raise OSError(f"example {index} of mine/train cannot be read: I/O error")
        return super().__getitem__(index)


class InBlocks(Unreadable):
    """The same, read several at once."""

    def __getitems__(self, indices):
        return [self[index] for index in indices]


@pytest.mark.parametrize("source", [Unreadable, InBlocks])
def test_an_unreadable_example_is_a_zero_image_that_is_named(source):
    batches = read(evaluation(source(damaged())))
    image, label, mask, index, error = (
        np.concatenate([batch[name] for batch in batches])
        for name in ("image", "label", "mask", "index", "error")
    )
    bad = [3, 5, 6, 20]
    assert list(np.flatnonzero(error != "")) == bad == list(index[bad])
    assert not mask[bad].any()
    assert not image[bad].any()
    assert not label[bad].any()
    assert mask.sum() == NUM_EXAMPLES - len(bad)
    assert error[3].startswith("example 3 (cat/0003.jpg) cannot be decoded: ")
    assert error[5] == "example 5 of mine/train cannot be read: I/O error"
    assert error[20].startswith("example 20 cannot be decoded: not an image")


def test_a_batch_of_nothing_but_unreadable_examples_has_its_shape():
    batch = read(evaluation([{"image": b"", "label": 1}] * 4, batch_size=4))[0]
    assert batch["image"].shape == (4, 12, 16, 3)
    assert not batch["mask"].any()
    assert all(batch["error"])


@pytest.mark.parametrize(
    ("records", "text"), [(damaged(), "example 3 "), (Unreadable(RECORDS), "example 5 ")]
)
def test_strict_raises_for_an_unreadable_example(records, text):
    with pytest.raises(ValueError, match=text) as caught:
        read(evaluation(records, strict=True))
    assert "\n" not in str(caught.value)


def test_an_error_in_a_worker_reaches_the_reader_and_ends_the_workers():
    with pytest.raises(ValueError, match="example 3 "):
        read(evaluation(damaged(), strict=True, num_workers=1))
    assert not multiprocessing.active_children()


def test_a_worker_that_dies_is_an_error_and_no_hang():
    with training(num_workers=1, num_steps=10_000) as loader:
        next(loader)
        (worker,) = multiprocessing.active_children()
        os.kill(worker.pid, signal.SIGTERM)  # meant for the run, which decides when to stop
        for _ in range(5):
            next(loader)
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match="terminated unexpectedly"):
            for _ in range(10_000):
                next(loader)


PARENT = """
    import multiprocessing, sys, time
    sys.path.insert(0, sys.argv[1])
    from test_loader import training
    if __name__ == "__main__":
        loader = training(num_workers=2, num_steps=10_000)
        next(loader)
        print(*[child.pid for child in multiprocessing.active_children()], flush=True)
        time.sleep(600)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks processes up in /proc")
def test_workers_end_when_their_parent_is_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(textwrap.dedent(PARENT))
    command = [sys.executable, str(script), str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(workers) == 2
        assert all(is_running(pid) for pid in workers)
        parent.kill()
    deadline = time.monotonic() + 10
    while any(is_running(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_running(pid) for pid in workers)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_worker_for_each_core(monkeypatch):
    monkeypatch.setattr(loader_module, "num_cores", lambda: 3)
    with training(num_workers=-1, num_steps=8) as loader:
        assert loader._num_workers == 3
    with training(num_workers=-1, num_steps=2) as loader:  # no more than there are batches
        assert loader._num_workers == 2


def test_small_images_are_decoded_by_one_thread_and_read_in_one_go(monkeypatch):
    monkeypatch.setattr(loader_module, "num_cores", lambda: 3)
    large = make_augmentation(name="stretch", size=(224, 224))
    for options, num_threads in (
        ({}, 1),
        ({"num_threads": 2}, 2),
        ({"augment": large}, 3),
        ({"records": [{"image": bytes(20_000), "label": 0}]}, 3),
        ({"records": [RECORDS[5], {"image": bytes(20_000), "label": 0}]}, 3),
        ({"records": Unreadable(RECORDS[5:])}, 1),
        ({"records": Unreadable(RECORDS), "augment": large}, 3),
    ):
        with training(**options) as loader:
            assert loader._batches.num_threads == num_threads
    blocks = []

    class Spy(InBlocks):
        def __getitems__(self, indices):
            blocks.append(len(indices))
            return super().__getitems__(indices)

    read(training(Spy(RECORDS[7:]), num_steps=2))
    assert blocks == [BATCH, BATCH]


def test_two_loaders_are_read_at_once():
    with training() as train, evaluation() as evaluate:
        pairs = [(next(train), next(evaluate)) for _ in range(4)]
    assert digests([pair[0] for pair in pairs]) == digests(read(training(num_steps=4)))
    assert digests([pair[1] for pair in pairs]) == digests(read(evaluation()))


def test_closing_ends_the_threads_and_the_reading():
    loader = training(num_threads=3)
    next(loader)
    assert any(thread.name.startswith("vit_jax-decode") for thread in loader_threads())
    loader.close()
    loader.close()
    deadline = time.monotonic() + 5
    while loader_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not loader_threads()
    with pytest.raises(ValueError, match="closed"):
        next(loader)


def loader_threads():
    names = ("vit_jax-decode", "grain-prefetch")
    return [
        thread for thread in loader_module.threading.enumerate() if thread.name.startswith(names)
    ]


def test_an_unread_loader_can_be_closed():
    with training(num_workers=2) as loader:
        assert len(loader) == NUM_STEPS
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 must be"),
        ({"num_workers": -2}, "num_workers=-2 must be -1 or more"),
        ({"num_threads": -1}, "num_threads=-1 must be 0 or more"),
        ({"prefetch": 0}, "prefetch=0 must be 1 or more"),
        ({"records": []}, "no examples"),
    ],
)
def test_wrong_arguments_are_told_before_reading(options, message):
    with pytest.raises(ValueError, match=message):
        training(**options)


def test_loaders_of_a_dataset_by_name(monkeypatch):
    """The rest of what `make_loader` does is `load_source`, which has its own tests."""
    asked = []

    def load_source(name, *, split, data_dir):
        asked.append((name, split, data_dir))
        return RECORDS

    monkeypatch.setattr(loader_module, "load_source", load_source)
    run = {"augment": CROP, "batch_size": BATCH, "seed": 0, "num_steps": 3}
    assert digests(read(make_loader(name="mine", **run))) == digests(read(training(num_steps=3)))
    found = read(make_eval_loader(name="mine", split="test", augment=CROP, batch_size=16))
    assert len(found) == 4
    assert asked == [("mine", "train", "data"), ("mine", "test", "data")]
    with pytest.raises(ValueError, match="order='sorted' is unknown; choose from global"):
        make_loader(name="mine", order="sorted", **run)
