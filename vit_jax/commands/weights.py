"""What `predict`, `embed` and `export` share: the flags for weights, and reading them."""

import contextlib
import dataclasses
import signal
import sys
import threading
from collections.abc import Iterator
from typing import NamedTuple

import tqdm
from absl import flags
from etils import epath

from vit_jax.commands.flags import parse_size
from vit_jax.data.augment import Augmentation


class Weights(NamedTuple):
    """A model, the names of its classes if they are known, and how it wants its images."""

    model: object
    class_names: tuple[str, ...]
    augment: Augmentation


def define_source(values: flags.FlagValues) -> None:
    """The flags that say which weights."""
    flags.DEFINE_string("workdir", None, "A run's folder.", flag_values=values)
    flags.DEFINE_string("model", None, "Or weights: see vit-jax import.", flag_values=values)
    flags.DEFINE_integer("step", None, "Which checkpoint of a run.", flag_values=values)
    flags.DEFINE_string("image_size", None, "Resample to 384 or 384x256.", flag_values=values)
    flags.DEFINE_integer("num_heads", None, "Where no file tells.", flag_values=values)


def define(values: flags.FlagValues) -> None:
    """The flags of what answers for images."""
    define_source(values)
    flags.DEFINE_integer("batch_size", 32, "Images at once.", flag_values=values)
    flags.DEFINE_float(
        "crop_fraction",
        None,
        "Of the resized image, how much the model sees; the weights tell it, else 0.875.",
        flag_values=values,
    )
    flags.DEFINE_bool("overwrite", False, "Replace --out.", flag_values=values)


def check_source(values: flags.FlagValues) -> None:
    """Raises what can be told of weights and --out before anything is read."""
    if bool(values.workdir) == bool(values.model):
        raise ValueError("give either --workdir=DIR or --model=PATH.")
    if values.out and epath.Path(values.out).exists() and not values.overwrite:
        raise FileExistsError(f"{values.out} exists; choose another --out or add --overwrite.")
    if values.workdir and not (epath.Path(values.workdir) / "config.json").exists():
        raise FileNotFoundError(f"no checkpoint in {values.workdir}: it is no folder of a run.")
    parse_size("image_size", values.image_size)


def check(values: flags.FlagValues) -> None:
    """Raises what can be told before anything is read."""
    check_source(values)
    if values.batch_size < 1:
        raise ValueError(f"--batch_size={values.batch_size} must be at least 1.")


@contextlib.contextmanager
def cleaning_up() -> Iterator[None]:
    """SIGTERM ends the block as an exception, so that nothing half-written stays behind."""

    def stop(number, frame):
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # no other may set handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def read(values: flags.FlagValues):
    """The `Source` that the flags name, in the size that they ask for."""
    from vit_jax.interop.load import adapt, read_source

    size = parse_size("image_size", values.image_size)
    options = {"num_heads": values.num_heads, "image_size": size, "step": values.step}
    return adapt(read_source(values.workdir or values.model, **options), image_size=size)


def load(values: flags.FlagValues, *, one_vector: bool = False) -> Weights:
    """Reads the weights; what was assumed of them is said on stderr.

    Args:
      values: see `define`.
      one_vector: whether a model that answers all tokens is to pool them.
    """
    from vit_jax.inference import eval_augmentation
    from vit_jax.interop.spec import fill, make_model, nearest_pool
    from vit_jax.runtime import enable_compilation_cache

    enable_compilation_cache()
    source = read(values)
    for line in source.report.lines()[1:]:
        print(line.strip(), file=sys.stderr)
    spec = source.spec
    if one_vector and spec.pool == "none":
        spec = dataclasses.replace(spec, pool=nearest_pool(spec))
        print(f"note: the weights answer all tokens; pooled by {spec.pool!r}", file=sys.stderr)
    crop = spec.crop_fraction if values.crop_fraction is None else values.crop_fraction
    size, interpolation = spec.backbone["image_size"], spec.interpolation
    augment = eval_augmentation(size, crop_fraction=crop, interpolation=interpolation)
    return Weights(fill(make_model(spec), source.params), spec.class_names, augment)


def progress(total: int, *, shown: bool) -> tqdm.tqdm:
    """A bar on stderr; in a log file, a line now and then."""
    interval = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm.tqdm(total=total, unit=" images", disable=not shown, mininterval=interval)


def tell_unreadable(errors: list[str], total: int) -> None:
    """Names the images that were left out, on stderr.

    Raises:
      ValueError: they are all there were.
    """
    for error in errors:
        print(f"left out: {error}", file=sys.stderr)
    if errors and len(errors) == total:
        raise ValueError(f"none of the {total} images could be read; the first: {errors[0]}")
    if errors:
        print(f"note: {len(errors)} of {total} images could not be read", file=sys.stderr)
