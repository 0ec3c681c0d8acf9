"""What google's `.npz` files do not say but their code does, and what one of ours becomes there."""

import re
from collections.abc import Mapping

import numpy as np

from vit_jax.interop.facts import Facts
from vit_jax.interop.layouts import BIG_VISION, GOOGLE
from vit_jax.interop.spec import Spec, grid_of
from vit_jax.interop.tables import Layout, Params, write
from vit_jax.preprocess import HALF

SCANNED = re.compile(r"(.*Transformer/encoderblock)/(.*)")


def unscan(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """big_vision's scanned blocks, stacked on a leading axis, as single ones."""
    out = {}
    for name, array in arrays.items():
        if match := SCANNED.fullmatch(name):
            if not array.ndim:
                raise ValueError(f"{name} is a single number, not one array a block.")
            out |= {f"{match[1]}_{i}/{match[2]}": part for i, part in enumerate(array)}
        else:
            out[name] = array
    return out


def facts(params: Params, arrays: Mapping[str, np.ndarray]) -> Facts:
    """Of arrays by the table's names: heads are an axis, the rest is the code's.

    Both codes use JAX's GELU (tanh form), an epsilon of 1e-6, pixels in [-1, 1]; big_vision's GAP
    models have fixed sincos2d positions where they keep no table.
    """
    heads = [x.shape[-2] for name, x in arrays.items() if name.endswith("_0/query/kernel")]
    heads += [x.shape[-2] for name, x in arrays.items() if name.endswith("_1/query/kernel")]
    pool = "cls" if "backbone/cls_token" in params else "gap"
    if "pool/probe" in params:
        pool = "map"
    known = {
        "num_heads": heads[0] if heads else None,
        "activation": "gelu_tanh",
        "norm_eps": 1e-6,
        "pos_embed": None if "backbone/pos_embed" in params else "sincos2d",
        "final_norm": True,
    }
    return Facts(pool=pool, known=known)


def export(params: Params, spec: Spec) -> Params:
    """Arrays in google's names: vision_transformer's, or big_vision's for what only it has.

    Raises:
      ValueError: there is no name for a part, or the code there computes something else.
    """
    wanted = {"activation": "gelu_tanh", "norm_eps": 1e-6, "norm": "layernorm", "final_norm": True}
    wanted |= {"parallel": False, "mlp": "mlp", "qkv_bias": True}
    for key, value in wanted.items():
        if spec.backbone[key] != value:
            raise ValueError(
                f"google's code has {key}={value!r}, this model {key}={spec.backbone[key]!r}; "
                "use --format=safetensors."
            )
    pools = ("cls",) if spec.backbone["cls_token"] else ("map", "gap")
    if spec.pool not in pools:
        raise ValueError(
            f"google's models with cls_token={spec.backbone['cls_token']} pool by "
            f"{' or '.join(pools)}, not by {spec.pool!r}; use --format=safetensors."
        )
    layout, heads = _layout(spec), spec.backbone["num_heads"]
    return write(layout, params, num_heads=heads)


def left_out(spec: Spec) -> list[str]:
    """What google's names have no room for, and their readers take for granted."""
    notes = []
    if (spec.mean, spec.std) != (HALF, HALF):
        said = [" ".join(f"{x:.4g}" for x in values) for values in (spec.mean, spec.std)]
        notes.append(f"left out: normalisation by mean {said[0]}, std {said[1]}; readers take 0.5")
    default = Facts(pool=spec.pool, known={})
    crop = (default.crop_fraction, default.interpolation)
    if (spec.crop_fraction, spec.interpolation) != crop:
        notes.append(f"left out: how images are resized; readers take a crop of {crop[0]}")
    grid = grid_of(spec.backbone)
    if grid[0] != grid[1]:
        size = "x".join(map(str, spec.backbone["image_size"]))
        notes.append(f"left out: the grid of {grid} patches; tell readers --image_size={size}")
    if spec.class_names:
        notes.append("left out: class names")
    return notes


def _layout(spec: Spec) -> Layout:
    """vision_transformer's code has a table with a row for the class token, and no MAP head."""
    learned = spec.backbone["pos_embed"] == "learned"
    if spec.pool in ("cls", "gap") and learned:
        return GOOGLE
    return BIG_VISION
