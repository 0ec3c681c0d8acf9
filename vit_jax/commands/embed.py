"""`vit-jax embed`: features of images, for what comes after."""

import csv
from typing import NamedTuple

import numpy as np
from absl import flags
from etils import epath

from vit_jax.commands import weights
from vit_jax.commands.flags import parse

USAGE = """vit-jax embed: writes features, float32, one row an image.

  vit-jax embed --workdir=DIR [--step=N] | --model=PATH  --out=FILE.npy|FILE.parquet [--overwrite]
      IMAGE… | FOLDER | --dataset=NAME [--split=test] [--data_dir=data]

FILE.npy is an array [images, features]; FILE.csv beside it names the images, row by row, and the
labels of a dataset. FILE.parquet has the columns image, label, class and features."""


class Embedded(NamedTuple):
    """What is written.

    Attributes:
      names: of the images.
      labels: of a dataset's; empty for files.
      classes: the labels' names.
      features: [images, features] float32.
    """

    names: list[str]
    labels: list[int]
    classes: list[str]
    features: np.ndarray


def main(argv: list[str]) -> int:
    """Runs `vit-jax embed`; answers the exit code."""

    def define(values: flags.FlagValues) -> None:
        weights.define(values)
        flags.DEFINE_string("out", None, "File to write.", flag_values=values)
        flags.DEFINE_string("dataset", None, "A prepared dataset.", flag_values=values)
        flags.DEFINE_string("split", "test", "Of the dataset.", flag_values=values)
        flags.DEFINE_string("data_dir", "data", "Where datasets are.", flag_values=values)

    values, images = parse(argv, define, usage=USAGE)
    _check(values, images)
    found = _embed(values, images)
    with weights.cleaning_up():
        _write(found, epath.Path(values.out), overwrite=values.overwrite)
    count, width = found.features.shape
    print(f"done: {count} × {width} features in {values.out}")
    return 0


def _check(values: flags.FlagValues, images: list[str]) -> None:
    weights.check(values)
    if not values.out:
        raise ValueError("--out is missing: a file to write, like --out=features.npy.")
    suffix = epath.Path(values.out).suffix
    if suffix not in (".npy", ".parquet"):
        raise ValueError(f"--out={values.out} must end in .npy or .parquet.")
    names = epath.Path(values.out).with_suffix(".csv")
    if suffix == ".npy" and names.exists() and not values.overwrite:
        raise FileExistsError(f"{names} exists; choose another --out or add --overwrite.")
    if bool(images) == bool(values.dataset):
        raise ValueError("give either images (files or a folder) or --dataset=NAME.")


def _embed(values: flags.FlagValues, images: list[str]) -> Embedded:
    from vit_jax.data.sources import load_source
    from vit_jax.inference import answers, features, file_name, image_files

    class_names = ()
    if values.dataset:
        records = load_source(values.dataset, split=values.split, data_dir=values.data_dir)
        class_names = records.info.class_names
    else:
        records = image_files(images)
    model, _, augment = weights.load(values, one_vector=True)
    options = {"augment": augment, "batch_size": values.batch_size}
    rows, labels, indices, errors = [], [], [], []
    shown = len(records) > len(images)  # a folder or a dataset
    with weights.progress(len(records), shown=shown) as bar:
        for answer in answers(model, records, features, **options):
            rows.append(answer.values)
            labels += answer.label.tolist()
            indices += answer.index.tolist()
            errors += answer.errors
            bar.update(len(answer.index) + len(answer.errors))
    weights.tell_unreadable(errors, len(records))
    if not values.dataset:
        names = [file_name(records.paths[index]) for index in indices]
        return Embedded(names, [], [], np.concatenate(rows))
    names = [_name(records[index], f"{values.split}[{index}]") for index in indices]
    return Embedded(names, labels, [class_names[k] for k in labels], np.concatenate(rows))


def _name(record: dict, otherwise: str) -> str:
    """A record's own name, if its dataset keeps any."""
    name = record.get("filename", b"")
    return (name.decode("utf-8", "replace") if isinstance(name, bytes) else name) or otherwise


def _write(found: Embedded, out: epath.Path, *, overwrite: bool) -> None:
    from vit_jax.interop.files import new_file

    if out.suffix == ".parquet":
        with new_file(out, overwrite=overwrite) as path:
            _write_parquet(found, path)
        return
    names = out.with_suffix(".csv")
    with new_file(names, overwrite=overwrite) as beside, new_file(out, overwrite=overwrite) as path:
        with path.open("wb") as file:
            np.save(file, found.features)
        with beside.open("w") as file:
            table = csv.writer(file, lineterminator="\n")
            if found.labels:
                table.writerow(("image", "label", "class"))
                table.writerows(zip(found.names, found.labels, found.classes, strict=True))
            else:
                table.writerow(("image",))
                table.writerows((name,) for name in found.names)


def _write_parquet(found: Embedded, path: epath.Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    flat = pa.array(found.features.reshape(-1))
    columns = {"image": found.names}
    if found.labels:
        columns |= {"label": pa.array(found.labels, pa.int32()), "class": found.classes}
    columns["features"] = pa.FixedSizeListArray.from_arrays(flat, found.features.shape[1])
    with path.open("wb") as file:
        pq.write_table(pa.table(columns), file)
