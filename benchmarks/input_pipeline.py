"""Images a second on one core: JPEG to random-resized-crop of 224 to batch, by the real loader.

    python benchmarks/input_pipeline.py [--num_files=64] [--seconds=1] [--repeats=15] [--vs=tf]

The files are distinct windows of 500 x 375 out of scikit-learn's two photographs, each encoded at
the JPEG quality that comes nearest to 110 KB (ImageNet's mean). The crop is Inception's, of 0.08 to
1 of the area. Everything is pinned to one core and has one thread. They are taken in by
`vit-jax prepare` into each of its stores (`tiled` where jpegtran is installed; `resized` to a
shorter side of 256). The encoded ones then lie in memory, as tf.data's do; the raw one is read by
memory map, and its checksums are done with after the first batch, which is not counted.

`bare` is `simplejpeg.decode_jpeg` of the same bytes and nothing more: a bound for whoever decodes
whole images, and `share` is what the loader reaches of it. With `--vs=tf`, where TensorFlow is
installed, tf.data does the same work on the same bytes in memory; it decodes the crop alone. All
are measured in turn, `repeats` times, by the process's CPU time, which other load on the machine
disturbs less; the median of each is given, and the spread. Prints a line to read and a JSON line.
"""

import argparse
import functools
import json
import os
import pathlib
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np
import simplejpeg
from sklearn.datasets import load_sample_images

from vit_jax.data.augment import make_augmentation
from vit_jax.data.loader import Loader, Records
from vit_jax.data.order import global_order
from vit_jax.data.prepare import prepare_folder
from vit_jax.data.sources import load_source
from vit_jax.data.stores import STORES

HEIGHT, WIDTH, TARGET_BYTES, SIZE, BATCH = 375, 500, 110_000, 224, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num_files", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--vs", choices=["tf"])
    args = parser.parse_args()

    core = min(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    files = photographs(args.num_files)
    with tempfile.TemporaryDirectory() as folder:
        contestants = {
            store: functools.partial(loader_batches, source)
            for store, source in datasets(files, pathlib.Path(folder)).items()
        }
        contestants["bare"] = functools.partial(bare_batches, files)
        if args.vs:
            contestants["tf.data"] = functools.partial(tf_batches, files)
        report(contestants, files, args)


def report(
    contestants: dict[str, Callable[[], Iterator[int]]],
    files: list[bytes],
    args: argparse.Namespace,
) -> None:
    rates = {name: [] for name in contestants}
    for _ in range(args.repeats):
        for name, batches in contestants.items():
            rates[name].append(rate(batches, args.seconds))

    median = {name: statistics.median(each) for name, each in rates.items()}
    result = {
        "images_per_second": {name: round(value, 1) for name, value in median.items()},
        "spread": {
            name: [round(min(each), 1), round(max(each), 1)] for name, each in rates.items()
        },
        "share_of_bare_decoding": round(median["jpeg"] / median["bare"], 3),
        "num_files": len(files),
        "mean_bytes": round(statistics.mean(map(len, files))),
        "load_average": round(os.getloadavg()[0], 2),
    }
    if args.vs:
        result["times_tf_data"] = {
            name: round(value / median["tf.data"], 2) for name, value in median.items()
        }
    print(
        f"{median['jpeg']:.0f} images/s on one core ({result['share_of_bare_decoding']:.0%} of "
        f"bare decoding): {len(files)} JPEGs of {WIDTH}x{HEIGHT}, "
        f"{result['mean_bytes'] / 1000:.0f} KB, cropped to {SIZE}, batches of {BATCH}"
    )
    print(json.dumps(result))


def rate(batches: Callable[[], Iterator[int]], seconds: float) -> float:
    """Images a second of CPU time after the first batch; `batches` yields each one's size."""
    running = batches()
    next(running)
    start, count = time.process_time(), 0
    while time.process_time() - start < seconds:
        count += next(running)
    elapsed = time.process_time() - start
    running.close()
    return count / elapsed


def datasets(files: list[bytes], folder: pathlib.Path) -> dict[str, Records]:
    """The files in each store, by its name."""
    (folder / "images" / "a").mkdir(parents=True)
    for number, data in enumerate(files):
        (folder / "images" / "a" / f"{number:04d}.jpg").write_bytes(data)
    data_dir, made = str(folder / "data"), {}
    for store in STORES:
        if store == "tiled" and shutil.which("jpegtran") is None:
            print("jpegtran is not installed: nothing is said of the store 'tiled'")
            continue
        size = {"store_size": 256} if store == "resized" else {}
        prepare_folder(
            folder / "images", name=store, data_dir=data_dir, progress=False, store=store, **size
        )
        source = load_source(store, split="train", data_dir=data_dir)
        made[store] = source if store == "raw" else list(source)
    return made


def loader_batches(source: Records) -> Iterator[int]:
    order = functools.partial(global_order, num_examples=len(source), seed=0)
    augment = make_augmentation(
        name="inception_crop_flip", size=(SIZE, SIZE), min_scale=0.08, max_scale=1.0
    )
    with Loader(
        source,
        order=order,
        augment=augment,
        batch_size=BATCH,
        seed=0,
        num_steps=10**6,
        num_threads=1,
        prefetch=1,
    ) as loader:
        for batch in loader:
            yield int(batch["mask"].sum())


def bare_batches(files: list[bytes]) -> Iterator[int]:
    while True:
        for data in files:
            simplejpeg.decode_jpeg(data)
        yield len(files)


def tf_batches(files: list[bytes]) -> Iterator[int]:
    """The usual ImageNet input in tf.data: only the crop is decoded, then resized bilinearly."""
    import tensorflow as tf

    def crop(data: tf.Tensor) -> tf.Tensor:
        shape = tf.image.extract_jpeg_shape(data)
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            shape,
            tf.zeros([0, 0, 4]),
            area_range=(0.08, 1.0),
            min_object_covered=0.0,
            use_image_if_no_bounding_boxes=True,
        )
        window = tf.stack([begin[0], begin[1], size[0], size[1]])
        image = tf.image.decode_and_crop_jpeg(data, window, channels=3)
        image = tf.image.random_flip_left_right(tf.image.resize(image, (SIZE, SIZE)))
        return tf.cast(image, tf.uint8)

    options = tf.data.Options()
    options.threading.private_threadpool_size = 1
    options.threading.max_intra_op_parallelism = 1
    data = tf.data.Dataset.from_tensor_slices(files).shuffle(len(files)).repeat()
    data = data.map(crop, num_parallel_calls=1).batch(BATCH).prefetch(1).with_options(options)
    for batch in data.as_numpy_iterator():
        yield len(batch)


def photographs(count: int) -> list[bytes]:
    """JPEGs of distinct windows, on a grid of offsets over each photograph."""
    images = load_sample_images().images
    side = int(np.ceil(np.sqrt(count / len(images))))
    windows = [
        image[top : top + HEIGHT, left : left + WIDTH]
        for top in np.linspace(0, images[0].shape[0] - HEIGHT, side).astype(int)
        for left in np.linspace(0, images[0].shape[1] - WIDTH, side).astype(int)
        for image in images
    ]
    files = [encode(np.ascontiguousarray(window)) for window in windows[:count]]
    if len(set(files)) < count:
        raise ValueError(f"num_files={count} windows are not all distinct; ask for fewer.")
    return files


def encode(window: np.ndarray) -> bytes:
    """A JPEG (4:2:0) of the quality whose size is nearest to TARGET_BYTES."""
    files = (
        simplejpeg.encode_jpeg(window, quality=quality, colorsubsampling="420")
        for quality in range(90, 101)
    )
    return min(files, key=lambda data: abs(len(data) - TARGET_BYTES))


if __name__ == "__main__":
    main()
