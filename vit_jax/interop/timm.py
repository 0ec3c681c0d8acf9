"""timm: what its folders say, what its code adds, and what one of ours becomes there."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from etils import epath

from vit_jax.interop.certificate import Answer, version
from vit_jax.interop.facts import Facts, Told, pair
from vit_jax.interop.layouts import HEAD_DIST, TIMM
from vit_jax.interop.spec import Spec
from vit_jax.interop.tables import Params, Row, write
from vit_jax.models.model import Model
from vit_jax.models.pos_embed import sincos2d
from vit_jax.preprocess import HALF

ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_tanh"}
Q_BIAS = re.compile(r"(.*blocks\.\d+\.attn)\.q_bias")


def fuse(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """EVA's biases of queries and values as one of qkv: its keys have none, which is zero."""
    out = dict(arrays)
    for name in arrays:
        if match := Q_BIAS.fullmatch(name):
            q, v = out.pop(name), out.pop(f"{match[1]}.v_bias", None)
            if v is None:
                raise ValueError(f"there is {name} but no {match[1]}.v_bias.")
            out[f"{match[1]}.qkv.bias"] = np.concatenate([q, np.zeros_like(q), v])
    return out


def unfuse(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inverse.

    Raises:
      ValueError: keys have a bias.
    """
    out = {}
    for name, array in arrays.items():
        if not name.endswith(".attn.qkv.bias"):
            out[name] = array
            continue
        q, k, v = np.split(array, 3)
        if np.any(k):
            raise ValueError("timm's RoPE models have no bias of keys; use --format=safetensors.")
        stem = name.removesuffix(".qkv.bias")
        out |= {f"{stem}.q_bias": q, f"{stem}.v_bias": v}
    return out


class Kind(NamedTuple):
    """What an architecture computes that no array tells: its GELU, its epsilon, whether by RoPE."""

    activation: str = "gelu"
    norm_eps: float = 1e-6
    rope: bool = False


PLAIN, TANH, DINOV3 = Kind(), Kind(activation="gelu_tanh"), Kind(norm_eps=1e-5, rope=True)
_SIZE = r"(tiny|small|base|large|huge|giant|gigantic)"
# timm 1.0's architectures that are read, by their whole names; the first that fits counts. Others
# have the same arrays and compute something else with them (norms after the branches, other RoPE).
ARCHITECTURES = (
    (
        rf"vit_{_SIZE}_patch\d+(_plus)?_\d+(_in21k|_miil|_miil_in21k)?|vit_small_patch16_36x1_224",
        PLAIN,
    ),
    (r"vit_[a-z]+_patch\d+(_reg\d)?_gap_\d+", PLAIN),
    (rf"vit_{_SIZE}_patch14(_reg4)?_dinov2|vit_\w+_patch14_reg1_tipsv2", PLAIN),
    (r"deit3?_\w+|flexivit_\w+|eva_large_patch14_\d+|eva_giant_patch14_\d+", PLAIN),
    (r"vit_base_patch32_siglip_\w+|vit_large_patch16_siglip_(gap_)?512", TANH),
    (r"vit_so400m_patch16_siglip_\w+|vit_giantopt_patch16_siglip_\w+", TANH),
    (r"vit_(base|large|so400m)_patch\d+_siglip_\w+", PLAIN),
    (r"vit_\w+_patch16_dinov3(_qkvb)?|vit_\w+_patch16_lingbot", DINOV3),
)
# Those with other than 64 channels a head, which is what is taken for all others.
HEADS = (
    (r"vit_(huge|giant|gigantic)_patch\d+_(gap_)?\d+|deit3_huge_\w+|eva_giant_\w+", 16),
    (r"vit_(so400m|giantopt)_\w+|vit_base_patch16_gap_224", 16),
    (r"vit_7b_\w+", 32),
)
# Blocks, where model_args do not tell: a file that was cut short has fewer.
DEPTHS = (
    (r".*_patch16_36x1_\d+", 36),
    (r"(vit|deit3?|flexivit)_(tiny|small|base)(_\w+)?", 12),
    (r"(vit|deit3?|flexivit|eva)_large(_\w+)?", 24),
    (r"vit_so400m_\w+", 27),
    (r"(vit|deit3)_huge_\w+", 32),
    (r"(vit|eva)_giant_\w+|vit_giantopt_\w+|vit_7b_\w+", 40),
    (r"vit_gigantic_\w+", 48),
)
# model_args that the arrays show, that `facts` reads, or that change nothing once trained.
_READ = {
    *("img_size", "patch_size", "in_chans", "num_classes", "global_pool", "embed_dim", "depth"),
    *("num_heads", "mlp_ratio", "qkv_bias", "qk_norm", "init_values", "class_token", "final_norm"),
    *("no_embed_class", "reg_tokens", "num_reg_tokens", "fc_norm", "use_fc_norm", "act_layer"),
    *("swiglu_mlp", "swiglu_align_to", "dynamic_img_size", "pool_include_prefix", "weight_init"),
}
# Arrays outside the blocks of models that compute something else (CLIP's, BEiT's, learned RoPE).
_ELSEWHERE = r"norm_pre\..*|patch_embed\.norm\..*|.*rel_pos_bias.*|rope\.freqs.*"


def facts(config: Mapping[str, Any], params: Params, arrays: Mapping[str, np.ndarray]) -> Facts:
    """Of a folder's config.json, {} for a lone file, and of arrays by the table's names.

    Raises:
      ValueError: an architecture or a part of one that computes something else.
    """
    told = Told(config)
    given = told.part("model_args")
    # Older folders have at the root what is under pretrained_cfg since.
    trained = told.part("pretrained_cfg") if config.get("pretrained_cfg") else told
    kind, notes = _kind(told, params, arrays)
    activation = given.get("act_layer", "a text") or kind.activation
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"act_layer={activation!r} is not supported; only {', '.join(ACTIVATIONS)}."
        )
    for name, value in given.values.items():
        if name not in _READ and not name.endswith("_rate") and value is not None:
            raise ValueError(f"config.json has {name}={value!r} in model_args: no part of ours.")
    sizes = "a size in pixels"
    size = given.get("img_size", sizes) or trained.get("input_size", sizes)
    pool = _pool(told, params, kind, notes)
    whole, named = "a whole number from 1", _architecture(told)
    known = {
        "num_heads": given.get("num_heads", whole) or _first(HEADS, named),
        "depth": given.get("depth", whole) or _first(DEPTHS, named),
        "qkv_bias": given.get("qkv_bias", "true or false"),
        "image_size": pair(size),
        "activation": ACTIVATIONS[activation],
        "norm_eps": kind.norm_eps,
        "pos_embed": "rope2d" if kind.rope else None,
    }
    if pool != "gap_norm":  # which has its norm behind the mean
        known["final_norm"] = given.get("final_norm", "true or false", True)
    mean, std = (trained.get("mean", "three numbers"), trained.get("std", "three positive numbers"))
    if not mean:
        notes.append("normalisation by 0.5: no config.json tells it; import has --mean and --std")
    return Facts(
        pool=pool,
        known=known,
        mean=tuple(mean or HALF),
        std=tuple(std or HALF),
        **_resize(trained),
        class_names=_class_names(told, trained),
        notes=notes,
    )


def _resize(trained: Told) -> dict[str, Any]:
    """`Spec`'s words for pretrained_cfg's; timm's defaults where it is silent."""
    if not trained.values:
        return {}
    fraction = trained.get("crop_pct", "a positive number", 0.875)
    mode = trained.get("crop_mode", "a text", "center")
    bilinear = trained.get("interpolation", "a text") == "bilinear"
    return {
        "crop_fraction": None if mode == "squash" and fraction == 1 else min(fraction, 1.0),
        "interpolation": "bilinear" if bilinear else "bicubic",
    }


def _class_names(*places: Told) -> tuple[str, ...]:
    """A list, or a dict by the logit's number, which may leave some out: then there are none.

    Those of the first place that has any; 'labels' is the older word.
    """
    words = [(place, word) for place in places for word in ("label_names", "labels")]
    place, word = next((pair for pair in words if pair[0].values.get(pair[1])), (places[0], ""))
    names = place.values.get(word, ())
    if not isinstance(names, Mapping):
        return tuple(place.get(word, "texts", ()))
    numbers = [str(i) for i in range(len(names))]
    return tuple(names[i] for i in numbers) if names.keys() == set(numbers) else ()


def _architecture(config: Told) -> str:
    name = config.get("architecture", "a text", "")
    return name.partition(".")[0]  # what follows is the weights' tag


def _first(table: tuple[tuple[str, Any], ...], name: str) -> Any:
    return next((value for pattern, value in table if re.fullmatch(pattern, name)), None)


def _kind(config: Told, params: Params, arrays) -> tuple[Kind, list[str]]:
    """By the architecture that config.json names, else by the arrays; and what was assumed."""
    if strange := sorted(name for name in arrays if re.fullmatch(_ELSEWHERE, name)):
        raise ValueError(f"timm's models with {strange[0]!r} compute something that ours do not.")
    bare = "backbone/pos_embed" not in params
    if named := _architecture(config):
        kind = _first(ARCHITECTURES, named)
        if kind is None:
            raise ValueError(
                f"timm's {named} is none of the architectures that are read: ViT, AugReg, DeiT, "
                "DeiT-III, FlexiViT, the first EVA, DINOv2, DINOv3 and SigLIP."
            )
        if kind.rope != bare:
            raise ValueError(
                f"config.json says {named}, which has {'no' if kind.rope else 'a'} table of "
                "positions, and the file is not so; fetch both again."
            )
        return kind, []
    block = "backbone/blocks/0/"
    scaled = f"{block}ls1/gamma" in params
    hidden = len(params.get(f"{block}mlp/fc2/kernel", ()))
    gated = len(params.get(f"{block}mlp/fc1/bias", ())) == 2 * hidden
    if gated and not bare and not scaled:  # DINOv2's giant has LayerScale
        raise ValueError("EVA-02 turns by RoPE beside its table of positions: it cannot be read.")
    as_dinov3 = "backbone/cls_token" in params and scaled
    if bare and not (as_dinov3 and len(params.get("backbone/reg_tokens", ())) == 4):
        raise ValueError(
            "there is no table of positions, and without a class token, 4 registers and LayerScale "
            "it is no DINOv3: which RoPE this is, only a config.json with 'architecture' tells."
        )
    kind = DINOV3 if bare else PLAIN
    what = "RoPE as DINOv3's" if bare else "norms before the branches"
    return kind, [
        f"{what}, exact GELU, epsilon {kind.norm_eps}: no config.json names the architecture"
    ]


def _pool(config: Told, params: Params, kind: Kind, notes: list[str]) -> str:
    given = config.part("model_args")
    named = given.get("global_pool", "a text") or config.get("global_pool", "a text")
    normed, has_cls = "pool/norm/scale" in params, "backbone/cls_token" in params
    if "pool/probe" in params:
        prefix = has_cls or "backbone/reg_tokens" in params
        if prefix and not kind.rope and not given.values.get("pool_include_prefix"):
            raise ValueError("timm's attention pooling leaves prefix tokens out; ours does not.")
        return "map"
    if "backbone/dist_token" in params:
        if f"{HEAD_DIST}/kernel" in params:
            return "cls_dist"
        notes.append("pool 'cls': without heads timm answers the mean of both tokens")
        return "cls"
    if named not in (None, "token", "avg") or (named == "token" and normed):
        raise ValueError(f"global_pool={named!r} is not read, only 'token', 'avg' and 'map'.")
    if normed:
        return "gap_norm"
    return "gap" if named == "avg" or not has_cls else "cls"


# timm's models that the others are variants of: class, MLP and rotary code come from them.
_BASES = {
    "dist": "deit_base_distilled_patch16_224",
    "rope": "vit_base_patch16_dinov3",
    "swiglu": "vit_giant_patch14_dinov2",
    "plain": "vit_base_patch16_224",
}
_POOLS = {"cls": "token", "gap": "avg", "gap_norm": "avg", "map": "map", "cls_dist": "token"}


def export(params: Params, spec: Spec) -> tuple[Params, dict[str, Any]]:
    """(arrays, config.json) of a model: one of timm's architectures, and its arguments.

    Raises:
      ValueError: timm has no model that computes this.
    """
    if why := _absent(spec):
        raise ValueError(f"timm has no ViT with {why}; use --format=safetensors.")
    b = spec.backbone
    params, bare = _positions(dict(params), spec)
    absent = "attn_pool." if spec.pool != "map" else "fc_norm"  # both are pool/norm here
    rows = tuple(row for row in TIMM.rows if not row.theirs.startswith(absent))
    if b["pos_embed"] == "rope2d":
        rows = _eva(rows, b)
    layout = dataclasses.replace(TIMM, rows=rows)
    arrays = write(layout, params, num_heads=b["num_heads"])
    return (unfuse(arrays) if b["pos_embed"] == "rope2d" else arrays), _config(spec, bare)


def _absent(spec: Spec) -> str:
    """What none of timm's models has, or ''."""
    b, pool = spec.backbone, spec.pool
    rope, gated = b["pos_embed"] == "rope2d", b["mlp"] == "swiglu"
    eps = 1e-5 if rope else 1e-6
    fixed = "gelu" if rope or gated else b["activation"]  # where act_layer cannot be given
    distilled = rope or gated or b["num_reg_tokens"] or pool != "cls_dist" or not spec.num_classes
    checks = {
        f"norm={b['norm']!r}": b["norm"] != "layernorm",
        "parallel=True": b["parallel"],
        f"pool={pool!r}": pool not in _POOLS,
        f"hidden_dim={spec.hidden_dim}": spec.hidden_dim,
        "pos_embed='none'": b["pos_embed"] == "none",
        "a norm both before and after pooling, or none": b["final_norm"] == (pool == "gap_norm"),
        f"norm_eps={b['norm_eps']} (here it is {eps})": b["norm_eps"] != eps,
        f"activation={b['activation']!r} beside RoPE": b["activation"] != fixed and not gated,
        "attention pooling beside SwiGLU": gated and pool == "map",
        f"attention pooling by {b['activation']!r} beside RoPE": (
            rope and pool == "map" and b["activation"] != fixed
        ),
        f"a distillation token beside pool={pool!r}, RoPE, SwiGLU, registers or without a head": (
            b["dist_token"] and distilled
        ),
    }
    return next((what for what, is_so in checks.items() if is_so), "")


def _eva(rows: tuple[Row, ...], b: Mapping[str, Any]) -> tuple[Row, ...]:
    """The table with EVA's names first."""
    ours = ("ls1", "ls2") if b["mlp"] == "mlp" else ("ls1", "ls2", "mlp/fc1")
    first = [r for r in rows if "gamma_" in r.theirs or "fc1_g" in r.theirs]
    first = [r for r in first if any(f"/{name}/" in r.ours for name in ours)]
    return (*first, *(row for row in rows if row not in first))


def _positions(params: Params, spec: Spec) -> tuple[Params, bool]:
    """The table that timm wants, and whether it has rows for the patches only."""
    b = spec.backbone
    grid = tuple(s // p for s, p in zip(b["image_size"], b["patch_size"], strict=True))
    prefix = b["cls_token"] + b["dist_token"]
    if b["pos_embed"] == "sincos2d":
        params["backbone/pos_embed"] = np.asarray(sincos2d(grid, b["dim"]))
        return params, True
    if b["pos_embed"] != "learned":
        return params, True
    table = params["backbone/pos_embed"]
    if not b["dist_token"] and not np.any(table[:prefix]):
        params["backbone/pos_embed"] = table[prefix:]
        return params, True
    registers = np.zeros((b["num_reg_tokens"], b["dim"]), np.float32)  # timm counts them in
    params["backbone/pos_embed"] = np.concatenate([table[:prefix], registers, table[prefix:]])
    return params, False


def _ratio(hidden: int, dim: int) -> float:
    """The ratio r for which timm's int(dim * r) is `hidden`: the quotient may fall just short."""
    ratio = hidden / dim
    return ratio if int(dim * ratio) == hidden else math.nextafter(ratio, math.inf)


def _config(spec: Spec, bare: bool) -> dict[str, Any]:
    b = spec.backbone
    kinds = {"dist": b["dist_token"], "rope": b["pos_embed"] == "rope2d"}
    kinds |= {"swiglu": b["mlp"] == "swiglu", "plain": True}
    kind = next(kind for kind, is_so in kinds.items() if is_so)
    arguments = {
        "img_size": list(b["image_size"]),
        "patch_size": list(b["patch_size"]),
        "embed_dim": b["dim"],
        "depth": b["depth"],
        "num_heads": b["num_heads"],
        "mlp_ratio": _ratio(b["mlp_dim"] * (2 if kind == "swiglu" else 1), b["dim"]),
        "qkv_bias": b["qkv_bias"],
        "qk_norm": b["qk_norm"],
        "init_values": 1.0 if b["layer_scale"] else None,
        "class_token": b["cls_token"],
        "global_pool": _POOLS[spec.pool],
    }
    if kind == "rope":
        arguments |= {"num_reg_tokens": b["num_reg_tokens"], "swiglu_mlp": b["mlp"] == "swiglu"}
        arguments["use_fc_norm"] = spec.pool == "gap_norm"
        if b["mlp"] == "swiglu":
            arguments["swiglu_align_to"] = 1  # gate and value are two layers, of any width
    else:
        arguments |= {"no_embed_class": bare, "fc_norm": spec.pool == "gap_norm"}
        arguments |= {"reg_tokens": b["num_reg_tokens"]}
        if b["mlp"] == "mlp":
            arguments["act_layer"] = b["activation"]
        if spec.pool == "map":
            arguments["pool_include_prefix"] = True
    height, width = b["image_size"]
    trained = {
        "input_size": [3, height, width],
        "mean": list(spec.mean),
        "std": list(spec.std),
        "interpolation": spec.interpolation,
        "crop_pct": 1.0 if spec.crop_fraction is None else spec.crop_fraction,
        "crop_mode": "squash" if spec.crop_fraction is None else "center",
        "num_classes": spec.num_classes,
        "first_conv": "patch_embed.proj",
        "classifier": "head" if spec.pool != "cls_dist" else ["head", "head_dist"],
    }
    return {
        "architecture": _BASES[kind],
        "num_classes": spec.num_classes,
        "num_features": b["dim"],
        "global_pool": _POOLS[spec.pool],
        "model_args": arguments,
        "pretrained_cfg": trained,
        "label_names": list(spec.class_names),
        "vit_jax": spec.to_json(),
    }


def run(folder: epath.Path, model: Model, images: np.ndarray) -> Answer:
    """What timm answers on uint8 images.

    Raises:
      ImportError: timm or torch is missing.
    """
    import timm
    import torch

    pixels = np.asarray(model.preprocess(jnp.asarray(images))).transpose(0, 3, 1, 2)
    with torch.no_grad():
        made = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        pixels = torch.from_numpy(np.ascontiguousarray(pixels))
        tokens, logits = made.forward_features(pixels), made(pixels)
    return Answer(f"{version('timm')}, {version('torch')}", logits.numpy(), tokens.numpy())
