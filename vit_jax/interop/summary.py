"""What is in a model that was read, and how two differ: for people and for machines."""

from typing import Any

import numpy as np

from vit_jax.interop.load import Source
from vit_jax.interop.spec import make_model, misfits
from vit_jax.models.vit import VARIANTS


def describe(source: Source) -> dict[str, Any]:
    """Format, shape, preprocessing, and every array's shape, type and bytes where it was read.

    An array that was made of several has the type that holds them all.
    """
    spec, b, types = source.spec, source.spec.backbone, source.report.dtypes
    wrong = misfits(make_model(spec), source.params)  # what loading it would refuse
    types = {name: np.dtype(types.get(name, x.dtype)) for name, x in source.params.items()}
    size = {name: x.size * types[name].itemsize for name, x in source.params.items()}
    return {
        "format": source.report.layout,
        "variant": variant_of(b),
        "backbone": b,
        "pool": spec.pool,
        "num_classes": spec.num_classes,
        "class_names": list(spec.class_names),
        "preprocessing": {
            **{"mean": list(spec.mean), "std": list(spec.std)},
            "resize": "stretch" if spec.crop_fraction is None else "center crop",
            **{"crop_fraction": spec.crop_fraction, "interpolation": spec.interpolation},
        },
        "parameters": sum(x.size for x in source.params.values()),
        "bytes": sum(size.values()),
        "report": source.report.lines()[1:] + [f"  misfit: {line}" for line in wrong],
        "arrays": {
            name: {"shape": list(x.shape), "dtype": str(types[name]), "bytes": size[name]}
            for name, x in source.params.items()
        },
    }


def compare(one: Source, other: Source) -> dict[str, Any]:
    """What the two say differently, and the arrays that differ."""
    first, second = describe(one), describe(other)
    skipped = ("arrays", "report")
    said = {
        key: [first[key], second[key]]
        for key in first
        if key not in skipped and first[key] != second[key]
    }
    arrays, equal = {}, 0
    for name in [*one.params, *(name for name in other.params if name not in one.params)]:
        a, b = one.params.get(name), other.params.get(name)
        if a is None or b is None:
            arrays[name] = "only in the " + ("second" if a is None else "first")
        elif a.shape != b.shape:
            arrays[name] = f"{a.shape} and {b.shape}"
        elif not np.array_equal(a, b):
            arrays[name] = f"largest difference {np.abs(a - b).max():.3g}"
        else:
            equal += 1
    return {"differs": said, "equal arrays": equal, "arrays": arrays}


def variant_of(backbone: dict[str, Any]) -> str:
    """'B/16', or 'custom/16' for a shape that has no name."""
    shape = tuple(backbone[key] for key in ("dim", "depth", "num_heads", "mlp_dim"))
    name = next((name for name, row in VARIANTS.items() if row == shape), "custom")
    height, width = backbone["patch_size"]
    return f"{name}/{height}" + (f"x{width}" if width != height else "")


def table(found: dict[str, Any]) -> list[str]:
    """Lines of two columns; nested values are indented."""
    lines = []
    for key, value in found.items():
        if isinstance(value, dict) and value:
            lines.append(f"{key}:")
            width = max(map(len, value))
            lines += [f"  {name:<{width}}  {_plain(part)}" for name, part in value.items()]
        else:
            lines.append(f"{key}: {_plain(value)}")
    return lines


def _plain(value: Any) -> str:
    if isinstance(value, dict):  # an array
        return "  ".join(str(part) for part in value.values())
    if isinstance(value, list):
        return ", ".join(map(str, value[:10])) + (" …" if len(value) > 10 else "") or "none"
    return str(value)
