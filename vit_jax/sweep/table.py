"""Results as tables: long form, pivot, leaderboard."""

import csv
import io
import pathlib
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vit_jax.evals.intervals import paired_test, unpack_bits
from vit_jax.spelling import nearest

COLUMNS = (
    *("checkpoint", "step", "dataset", "eval", "metric", "value", "low", "high", "count"),
    *("seconds", "config_digest"),
)
PARQUET = "results.parquet"
FIRST = ("top1", "accuracy")  # what a leaderboard is sorted by

Rows = list[dict[str, Any]]


def long_form(results: Iterable[Mapping[str, Any]]) -> Rows:
    """A row for each metric of each result, in an order that only the results decide."""
    rows = []
    for result in results:
        unit = result["unit"]
        same = {key: unit[key] for key in ("checkpoint", "step", "dataset", "eval")}
        same |= {"seconds": result["seconds"], "config_digest": unit["config_digest"]}
        rows += [{**same, **value} for value in result["values"]]
    rows = [{column: row[column] for column in COLUMNS} for row in rows]
    return sorted(rows, key=lambda row: (*_place(row), row["config_digest"]))


def _place(row: Mapping[str, Any]) -> tuple:
    step = -1 if row["step"] is None else row["step"]
    return row["checkpoint"], step, row["dataset"], row["eval"], row["metric"]


def write_parquet(rows: Rows, folder: pathlib.Path) -> pathlib.Path:
    """Writes `results.parquet`, whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = dict.fromkeys(COLUMNS, pa.string())
    kinds |= dict.fromkeys(("step", "count"), pa.int64())
    kinds |= dict.fromkeys(("value", "low", "high", "seconds"), pa.float64())
    schema = pa.schema([(column, kinds[column]) for column in COLUMNS])
    path = folder / PARQUET
    beside = folder / f".{PARQUET}.{uuid.uuid4().hex}.tmp"
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), beside)
    beside.replace(path)
    return path


def pivot(rows: Rows, by: str) -> Rows:
    """One row a checkpoint; the values of column `by` (and what tells them apart) beside.

    Args:
      rows: of `long_form`.
      by: 'metric', 'dataset', 'eval' or 'step'.

    Raises:
      ValueError: another column.
    """
    choices = ("metric", "dataset", "eval", "step")
    if by not in choices:
        raise ValueError(
            f"--pivot={by} is unknown{nearest(by, choices)}; use {', '.join(choices)}."
        )
    keys = [
        column for column in ("checkpoint", "step", "dataset", "eval", "metric") if column != by
    ]
    table: dict[tuple, dict[str, Any]] = {}
    for row in rows:
        line = table.setdefault(tuple(row[key] for key in keys), {key: row[key] for key in keys})
        line[str(row[by])] = row["value"]
    columns = keys + list(dict.fromkeys(str(row[by]) for row in rows))
    return [{column: line.get(column) for column in columns} for line in table.values()]


def leaderboard(results: Iterable[Mapping[str, Any]]) -> Rows:
    """Best first, for each dataset and evaluation with an accuracy.

    Rows hold dataset, eval, metric, checkpoint, step, value, low, high, count, and `p_value`: of
    McNemar's test against the best on the same examples (None for the best, or where the examples
    are not the same).
    """
    groups: dict[tuple, Rows] = {}
    for result in results:
        unit, values = result["unit"], {value["metric"]: value for value in result["values"]}
        metric = next((name for name in FIRST if name in values), None)
        if metric is None or values[metric]["value"] is None:
            continue
        key = unit["dataset"], unit["eval"], metric
        row = dict(zip(("dataset", "eval", "metric"), key, strict=True))
        row |= {"checkpoint": unit["checkpoint"], "step": unit["step"], **values[metric]}
        # The same places in a dataset that was prepared again are other examples.
        seen = unit.get("dataset_fingerprint"), unit["split"], result["artefacts"].get("correct")
        groups.setdefault(key, []).append(row | {"correct": seen})
    board = []
    for key in sorted(groups):
        rows = sorted(groups[key], key=lambda row: (-row["value"], _place(row)))
        best = rows[0].get("correct")
        for row in rows:
            mine = row.pop("correct")
            row["p_value"] = None if row is rows[0] else _p_value(best, mine)
        board += rows
    return board


def _p_value(best: tuple, mine: tuple) -> float | None:
    (*data, one), (*its_data, two) = best, mine
    if data != its_data or not one or not two or one["examples"] != two["examples"]:
        return None
    return paired_test(unpack_bits(one), unpack_bits(two)).p_value


def to_csv(rows: Rows, columns: Sequence[str]) -> str:
    """RFC 4180, with a header."""
    text = io.StringIO()
    table = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()


def to_text(rows: Rows, columns: Sequence[str]) -> str:
    """Columns as wide as they need to be."""
    cells = [list(columns)] + [[_cell(row[column]) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [[cell.ljust(w) for cell, w in zip(line, widths, strict=True)] for line in cells]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
