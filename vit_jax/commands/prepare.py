"""`vit-jax prepare`: makes a dataset, and says what it holds."""

import sys
from typing import TextIO

from absl import flags

from vit_jax.commands.flags import parse
from vit_jax.data import prepare
from vit_jax.data.prepare import Prepared

USAGE = """vit-jax prepare: makes a dataset that `vit-jax train` and stock TFDS read.

  vit-jax prepare digits                        scikit-learn's digits: nothing is downloaded
  vit-jax prepare folder PATH --name=NAME       images in PATH/<class>/ or PATH/<split>/<class>/
  vit-jax prepare tfds NAME[/CONFIG][:VERSION]  an official TFDS dataset (needs the extra `tfds`)
  vit-jax prepare convert PATH [--name=NAME]    a TFDS folder of TFRecord files, to ArrayRecord;
                                                of ArrayRecord files, to another --store

`vit-jax prepare folder --help` lists the flags of that one."""

_SHOWN = 20  # names of a list that is long and harmless


def main(argv: list[str]) -> int:
    """Runs `vit-jax prepare` with the arguments behind it; answers the exit code.

    Raises ValueError and OSError, in one line, for bad input.
    """
    kind = argv[0] if argv else ""
    if kind in ("-h", "-help", "--help"):
        print(USAGE)
        return 0
    if kind not in KINDS:
        raise ValueError(
            f"prepare {kind or 'what'}? It is one of {', '.join(KINDS)}; `vit-jax prepare --help`"
        )
    try:
        _print_summary(KINDS[kind](argv[1:]))
    except prepare.UnreadableImagesError as error:
        _print_rejected(error.rejected, file=sys.stderr)
        raise
    return 0


def _digits(argv: list[str]) -> Prepared:
    def define(values: flags.FlagValues) -> None:
        _define_common(values)
        flags.DEFINE_string("name", "digits", "What to call it.", flag_values=values)

    values, positional = parse(argv, define, usage="vit-jax prepare digits [flags]")
    _want(positional, "digits")
    return prepare.prepare_digits(
        name=values.name, data_dir=values.data_dir, overwrite=values.overwrite
    )


def _folder(argv: list[str]) -> Prepared:
    def define(values: flags.FlagValues) -> None:
        _define_common(values)
        _define_strict(values)
        _define_store(values)
        flags.DEFINE_string("name", "", "What to call it (required).", flag_values=values)
        flags.DEFINE_float(
            "holdout",
            0.0,
            "Fraction of train that becomes the split test, such as 0.1: seeded, not stratified.",
            flag_values=values,
        )
        flags.DEFINE_integer(
            "seed", 0, "Of the order of the records and of the hold-out.", flag_values=values
        )
        flags.DEFINE_bool(
            "shuffle_labels",
            False,
            "Deal the labels of train out anew: a control run, which must not generalise.",
            flag_values=values,
        )

    values, positional = parse(argv, define, usage="vit-jax prepare folder PATH --name=NAME")
    (path,) = _want(positional, "folder", "PATH")
    if not values.name:
        raise ValueError("--name=NAME is missing: what is the dataset to be called?")
    return prepare.prepare_folder(
        path,
        name=values.name,
        data_dir=values.data_dir,
        holdout=values.holdout,
        seed=values.seed,
        shuffle_labels=values.shuffle_labels,
        strict=values.strict,
        overwrite=values.overwrite,
        store=values.store,
        store_size=values.store_size,
    )


def _tfds(argv: list[str]) -> Prepared:
    def define(values: flags.FlagValues) -> None:
        _define_data_dir(values)
        flags.DEFINE_string(
            "manual_dir",
            "",
            "Where you put archives that TFDS may not download, such as ImageNet's.",
            flag_values=values,
        )

    values, positional = parse(argv, define, usage="vit-jax prepare tfds NAME[/CONFIG][:VERSION]")
    (name,) = _want(positional, "tfds", "NAME")
    return prepare.prepare_tfds(name, data_dir=values.data_dir, manual_dir=values.manual_dir)


def _convert(argv: list[str]) -> Prepared:
    def define(values: flags.FlagValues) -> None:
        _define_common(values)
        _define_strict(values)
        _define_store(values)
        flags.DEFINE_string(
            "name", "", "What to call the copy, if not the same.", flag_values=values
        )

    values, positional = parse(argv, define, usage="vit-jax prepare convert PATH [--name=NAME]")
    (path,) = _want(positional, "convert", "PATH")
    return prepare.prepare_convert(
        path,
        name=values.name,
        data_dir=values.data_dir,
        strict=values.strict,
        overwrite=values.overwrite,
        store=values.store,
        store_size=values.store_size,
    )


KINDS = {"digits": _digits, "folder": _folder, "tfds": _tfds, "convert": _convert}


def _define_data_dir(values: flags.FlagValues) -> None:
    flags.DEFINE_string("data_dir", "data", "Where datasets are kept.", flag_values=values)


def _define_common(values: flags.FlagValues) -> None:
    _define_data_dir(values)
    flags.DEFINE_bool(
        "overwrite",
        False,
        "Replace a dataset of that name, once the new one is whole.",
        flag_values=values,
    )


def _define_strict(values: flags.FlagValues) -> None:
    flags.DEFINE_bool("strict", False, "Fail if any image is unreadable.", flag_values=values)


def _define_store(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "store",
        "jpeg",
        "How images are kept: jpeg (as they came), tiled (JPEGs of which crops can be decoded), "
        "resized (smaller ones, see --store_size) or raw (pixels: much disk, no decoding).",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "store_size",
        0,
        "The shorter side in pixels that larger images are reduced to, of resized and raw.",
        flag_values=values,
    )


def _want(positional: list[str], kind: str, *names: str) -> list[str]:
    if len(positional) != len(names):
        command = " ".join(["vit-jax prepare", kind, *names])
        raise ValueError(f"`{command}` was given {positional or 'nothing'} behind {kind!r}")
    return positional


def _print_summary(prepared: Prepared) -> None:
    name, data_dir = prepared.name, prepared.data_dir
    for split, counts in prepared.class_counts.items():
        fewest, most = min(counts), max(counts)
        print(f"{split}: {sum(counts):,} examples, {fewest:,} to {most:,} in a class")
    print(f"classes: {len(prepared.class_names)} ({_shorten(prepared.class_names)})")
    if prepared.mean is not None:
        mean, std = (" ".join(f"{each:.4f}" for each in of) for of in (prepared.mean, prepared.std))
        print(f"mean: {mean}  std: {std}  (RGB in [0, 1], {prepared.num_measured:,} train images)")
    for what, changes in (("transposed", prepared.transposed), ("converted", prepared.converted)):
        if changes:
            print(
                f"{what}: {len(changes)} ({_shorten([f'{file}: {how}' for file, how in changes])})"
            )
    if prepared.ignored:
        print(f"ignored: {len(prepared.ignored)} other files ({_shorten(prepared.ignored)})")
    _print_rejected(prepared.rejected)
    for note in prepared.notes:
        print(f"note: {note}")
    if prepared.store != "jpeg":
        form = "not read by TFDS" if prepared.store == "raw" else "JPEGs with tiles"
        print(f"store: {prepared.store} ({form})")
    print(f"written to {prepared.path}")
    if "train" in prepared.class_counts:
        arguments = [] if name == "digits" else [f"name={name}"]
        arguments += [] if data_dir == "data" else [f"data_dir={data_dir}"]
        recipe = "digits" if name == "digits" else "image_folder"
        config = ":".join([recipe, *([",".join(arguments)] if arguments else [])])
        workdir = name.replace("/", "_").replace(":", "_")
        print(f"next: vit-jax train --config={config} --workdir=runs/{workdir}")


def _print_rejected(rejected: list[tuple[str, str]], file: TextIO | None = None) -> None:
    """All of them: who loses data should see which."""
    if rejected:
        print(f"unreadable: {len(rejected)}", file=file)
    for name, reason in rejected:
        print(f"  {name}: {reason}", file=file)


def _shorten(names: list[str]) -> str:
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
