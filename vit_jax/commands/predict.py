"""`vit-jax predict`: classes of images, most probable first."""

import csv
import io
import json
import sys
from typing import Any

import numpy as np
from absl import flags
from etils import epath

from vit_jax.commands import weights
from vit_jax.commands.flags import parse

USAGE = """vit-jax predict: classifies images.

  vit-jax predict --workdir=DIR [--step=N] | --model=PATH  IMAGE… | FOLDER
      [--top=5] [--output=text|csv|json|parquet] [--out=FILE [--overwrite]]

PATH: whatever `vit-jax import` reads. Images get the model's size as in evaluation: resized, then
cropped in the centre. Unreadable ones are named on stderr and left out."""

COLUMNS = ("image", "rank", "label", "class", "probability")


def main(argv: list[str]) -> int:
    """Runs `vit-jax predict`; answers the exit code."""

    def define(values: flags.FlagValues) -> None:
        weights.define(values)
        flags.DEFINE_integer("top", 5, "How many classes an image.", flag_values=values)
        flags.DEFINE_string("output", "text", "text, csv, json, parquet.", flag_values=values)
        flags.DEFINE_string("out", None, "File to write instead of stdout.", flag_values=values)

    values, images = parse(argv, define, usage=USAGE)
    _check(values, images)
    from vit_jax.inference import answers, file_name, image_files, probabilities

    files = image_files(images)
    model, class_names, augment = weights.load(values)
    if model.head is None:
        raise ValueError("these weights have no head, so no classes; try vit-jax embed.")
    rows, errors = [], []
    shown = any(epath.Path(name).is_dir() for name in images)
    options = {"augment": augment, "batch_size": values.batch_size}
    with weights.progress(len(files), shown=shown) as bar:
        for answer in answers(model, files, probabilities, **options):
            for index, row in zip(answer.index, answer.values, strict=True):
                rows += _rows(file_name(files.paths[index]), row, class_names, values.top)
            errors += answer.errors
            bar.update(len(answer.index) + len(answer.errors))
    weights.tell_unreadable(errors, len(files))
    _write(FORMATS[values.output](rows), values)
    return 0


def _check(values: flags.FlagValues, images: list[str]) -> None:
    weights.check(values)
    if not images:
        raise ValueError("which images? Give files or a folder, see vit-jax predict --help.")
    if values.top < 1:
        raise ValueError(f"--top={values.top} must be at least 1.")
    if values.output not in FORMATS:
        raise ValueError(
            f"--output={values.output} is unknown; choose one of {', '.join(FORMATS)}."
        )
    if values.output == "parquet" and not values.out:
        raise ValueError("--output=parquet needs --out=FILE.")


def _rows(name: str, row: np.ndarray, class_names, top: int) -> list[dict[str, Any]]:
    best = np.argsort(-row, kind="stable")[:top]  # ties by lowest label
    return [
        dict(
            zip(COLUMNS, (name, rank, int(k), *_named(k, class_names), float(row[k])), strict=True)
        )
        for rank, k in enumerate(best, 1)
    ]


def _named(label: int, class_names: tuple[str, ...]) -> tuple[str]:
    return (class_names[label] if class_names else str(label),)


def _text(rows: list[dict]) -> bytes:
    lines = []
    for name, found in _by_image(rows).items():
        said = ", ".join(f"{row['class']} {row['probability']:.2%}" for row in found)
        lines.append(f"{name}: {said}\n")
    return "".join(lines).encode()


def _csv(rows: list[dict]) -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def _json(rows: list[dict]) -> bytes:
    found = [
        {"image": name, "classes": [{key: row[key] for key in COLUMNS[2:]} for row in found]}
        for name, found in _by_image(rows).items()
    ]
    return (json.dumps(found, indent=1, ensure_ascii=False) + "\n").encode()


def _parquet(rows: list[dict]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


FORMATS = {"text": _text, "csv": _csv, "json": _json, "parquet": _parquet}


def _by_image(rows: list[dict]) -> dict[str, list[dict]]:
    found = {}
    for row in rows:
        found.setdefault(row["image"], []).append(row)
    return found


def _write(data: bytes, values: flags.FlagValues) -> None:
    from vit_jax.interop.files import new_file

    if not values.out:
        sys.stdout.write(data.decode())
        return
    with weights.cleaning_up(), new_file(values.out, overwrite=values.overwrite) as path:
        path.write_bytes(data)
    print(f"done: {values.output} in {values.out}")
