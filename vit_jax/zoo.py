"""Published Vision Transformers by name, with random weights: one row each."""

import dataclasses
import fnmatch
from collections.abc import Mapping
from typing import Any

from flax import nnx

from vit_jax.models.heads import make_head, make_pool
from vit_jax.models.model import Model
from vit_jax.models.vit import make_vit
from vit_jax.preprocess import HALF, Preprocess
from vit_jax.spelling import nearest


@dataclasses.dataclass(frozen=True)
class Row:
    """What a published model is made of.

    Attributes:
      variant: see `make_vit`.
      backbone: `make_vit`'s other keyword arguments.
      pool: see `make_pool`.
      num_classes: of the published head, 0 where there is none.
      normalize: mean and standard deviation by channel, where white is 1.
      published: number of parameters, to as many digits as were told.
    """

    variant: str
    backbone: Mapping[str, Any]
    pool: str
    num_classes: int
    normalize: tuple[tuple[float, ...], tuple[float, ...]]
    published: int


HALVES = (HALF, HALF)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

# Dosovitskiy et al. 2021; Steiner et al. 2022 (AugReg): trained in JAX, hence GELU's tanh form.
VIT = {"cls_token": True}
# Zhai et al. 2022 and after: attention pooling, no class token.
MAP = {"cls_token": False}
# Dehghani et al. 2023, section 2: its norms neither centre nor have a bias.
VIT_22B = MAP | {"parallel": True, "qk_norm": True, "qkv_bias": False, "norm": "rmsnorm"}
# Touvron et al. 2021: trained in torch, hence exact GELU; 2022 (DeiT-III): LayerScale.
DEIT = {"cls_token": True, "activation": "gelu"}
DISTILLED = DEIT | {"dist_token": True}
DEIT3 = DEIT | {"layer_scale": 1e-4}
# Oquab et al. 2023; Darcet et al. 2024 (registers).
DINOV2 = DEIT | {"layer_scale": 1e-5, "image_size": 518}
DINOV2_REG = DINOV2 | {"num_reg_tokens": 4}
DINOV2_GIANT = {"dim": 1536, "num_heads": 24, "mlp_dim": 4096, "mlp": "swiglu"}
# Siméoni et al. 2025. Keys have no bias there: the key's part of qkv's is zero.
DINOV3 = DEIT | {
    **{"layer_scale": 1e-5, "num_reg_tokens": 4, "pos_embed": "rope2d", "norm_eps": 1e-5}
}
GATED = DINOV3 | {"mlp": "swiglu"}
# He et al. 2022, appendix A.1: fine-tuned, the patches' mean has the only last norm.
MAE = DEIT | {"final_norm": False}

# What the counts hold is told in tests/test_zoo.py, beside those that are not to the last digit.
MODELS = {
    "vit_ti16": Row("Ti/16", VIT, "cls", 1000, HALVES, 5_717_416),
    "vit_s16": Row("S/16", VIT, "cls", 1000, HALVES, 22_050_664),
    "vit_s32": Row("S/32", VIT, "cls", 1000, HALVES, 22_878_952),
    "vit_m16": Row("M/16", VIT, "cls", 1000, HALVES, 38_880_000),
    "vit_b8": Row("B/8", VIT, "cls", 1000, HALVES, 86_580_000),
    "vit_b16": Row("B/16", VIT, "cls", 1000, HALVES, 86_567_656),
    "vit_b32": Row("B/32", VIT, "cls", 1000, HALVES, 88_224_232),
    "vit_l16": Row("L/16", VIT, "cls", 1000, HALVES, 304_326_632),
    "vit_l32": Row("L/32", VIT, "cls", 1000, HALVES, 306_535_400),
    "vit_h14": Row("H/14", VIT, "cls", 1000, HALVES, 632_045_800),
    "vit_so400m14": Row("So400m/14", MAP, "map", 1000, HALVES, 428_000_000),
    "vit_g14": Row("g/14", MAP, "map", 1000, HALVES, 1_011_000_000),
    "vit_gg14": Row("G/14", MAP, "map", 1000, HALVES, 1_843_000_000),
    "vit_e14": Row("e/14", MAP, "map", 1000, HALVES, 3_926_000_000),
    "vit_22b14": Row("22B/14", VIT_22B, "map", 1000, HALVES, 21_743_000_000),
    "deit_ti16": Row("Ti/16", DEIT, "cls", 1000, IMAGENET, 5_717_416),
    "deit_s16": Row("S/16", DEIT, "cls", 1000, IMAGENET, 22_050_664),
    "deit_b16": Row("B/16", DEIT, "cls", 1000, IMAGENET, 86_567_656),
    "deit_ti16_distilled": Row("Ti/16", DISTILLED, "cls_dist", 1000, IMAGENET, 5_910_000),
    "deit_s16_distilled": Row("S/16", DISTILLED, "cls_dist", 1000, IMAGENET, 22_440_000),
    "deit_b16_distilled": Row("B/16", DISTILLED, "cls_dist", 1000, IMAGENET, 87_340_000),
    "deit3_s16": Row("S/16", DEIT3, "cls", 1000, IMAGENET, 22_060_000),
    "deit3_m16": Row("M/16", DEIT3, "cls", 1000, IMAGENET, 38_850_000),
    "deit3_b16": Row("B/16", DEIT3, "cls", 1000, IMAGENET, 86_590_000),
    "deit3_l16": Row("L/16", DEIT3, "cls", 1000, IMAGENET, 304_370_000),
    "deit3_h14": Row("H/14", DEIT3, "cls", 1000, IMAGENET, 632_130_000),
    "dinov2_s14": Row("S/14", DINOV2, "cls", 0, IMAGENET, 22_056_576),
    "dinov2_b14": Row("B/14", DINOV2, "cls", 0, IMAGENET, 86_580_480),
    "dinov2_l14": Row("L/14", DINOV2, "cls", 0, IMAGENET, 304_368_640),
    "dinov2_g14": Row("g/14", DINOV2 | DINOV2_GIANT, "cls", 0, IMAGENET, 1_136_480_768),
    "dinov2_s14_reg": Row("S/14", DINOV2_REG, "cls", 0, IMAGENET, 22_060_000),
    "dinov2_b14_reg": Row("B/14", DINOV2_REG, "cls", 0, IMAGENET, 86_580_000),
    "dinov2_l14_reg": Row("L/14", DINOV2_REG, "cls", 0, IMAGENET, 304_370_000),
    "dinov2_g14_reg": Row("g/14", DINOV2_REG | DINOV2_GIANT, "cls", 0, IMAGENET, 1_136_480_000),
    "dinov3_s16": Row("S/16", DINOV3, "cls", 0, IMAGENET, 21_600_000),
    "dinov3_splus16": Row("S/16", GATED, "cls", 0, IMAGENET, 28_690_000),
    "dinov3_b16": Row("B/16", DINOV3, "cls", 0, IMAGENET, 86_000_000),
    "dinov3_l16": Row("L/16", DINOV3, "cls", 0, IMAGENET, 303_130_000),
    "dinov3_hplus16": Row("H/16", GATED | {"num_heads": 20}, "cls", 0, IMAGENET, 840_590_000),
    "dinov3_7b16": Row("7B/16", GATED | {"qkv_bias": False}, "cls", 0, IMAGENET, 6_716_000_000),
    "siglip_b16": Row("B/16", MAP, "map", 0, HALVES, 92_880_000),
    "siglip_l16": Row("L/16", MAP | {"image_size": 256}, "map", 0, HALVES, 315_960_000),
    "siglip_so400m14": Row("So400m/14", MAP, "map", 0, HALVES, 427_680_000),
    "mae_b16": Row("B/16", MAE, "gap_norm", 1000, IMAGENET, 86_567_656),
    "mae_l16": Row("L/16", MAE, "gap_norm", 1000, IMAGENET, 304_326_632),
    "mae_h14": Row("H/14", MAE, "gap_norm", 1000, IMAGENET, 632_045_800),
}


def list_models(pattern: str = "*") -> list[str]:
    """The names that `create_model` knows, in the table's order; 'dinov2_*' narrows them."""
    return fnmatch.filter(MODELS, pattern)


def create_model(
    name: str,
    *,
    num_classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    backbone: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Model:
    """A published architecture with random weights and its preprocessing: 'vit_s16', 'dinov2_b14'.

    Under `nnx.eval_shape` nothing is allocated.

    Args:
      name: one of `list_models()`.
      num_classes: of the head, 0 for none; the published one's by default.
      image_size: pixels in height and width; the published ones by default.
      backbone: arguments of `make_vit` that replace the row's, like {'drop_path': 0.1}.
      seed: of the weights.

    Raises:
      ValueError: an unknown name (the nearest is named), or a shape that does not work out.
    """
    if name not in MODELS:
        raise ValueError(
            f"model {name!r} is unknown{nearest(name, MODELS)}; vit_jax.list_models() lists all."
        )
    row = MODELS[name]
    num_classes = row.num_classes if num_classes is None else num_classes
    if num_classes < 0:
        raise ValueError(f"num_classes={num_classes} must not be negative; 0 makes no head.")
    options = {"variant": row.variant, **row.backbone, **(backbone or {})}
    if image_size is not None:
        options["image_size"] = image_size
    rngs = nnx.Rngs(seed)
    vit = make_vit(**options, rngs=rngs)
    pool = make_pool(row.pool, vit, rngs=rngs)
    head = make_head(row.pool, vit.dim, num_classes, rngs=rngs) if num_classes else None
    return Model(vit, pool, head, Preprocess(*row.normalize))
