"""transformers: what its config.json says, and which of its classes one of our models becomes."""

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

from vit_jax.interop.certificate import Answer, version
from vit_jax.interop.facts import Facts, Told, pair
from vit_jax.interop.layouts import HEAD, HEAD_DIST, HF_DINOV2, HF_DINOV3, HF_SIGLIP, HF_VIT
from vit_jax.interop.pools import AllTokens
from vit_jax.interop.spec import Spec, grid_of, make_model, params_of_shapes
from vit_jax.interop.tables import Layout, Params, write
from vit_jax.models.model import Model
from vit_jax.models.pos_embed import sincos2d
from vit_jax.preprocess import HALF

ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}

DEPTH = 12  # where a config.json leaves it out
# What else it leaves out has these values: heads, epsilon, activation.
DEFAULTS = {
    HF_VIT.name: (12, 1e-12, "gelu"),
    HF_DINOV2.name: (12, 1e-6, "gelu"),
    HF_DINOV3.name: (6, 1e-5, "gelu"),
    HF_SIGLIP.name: (12, 1e-6, "gelu_pytorch_tanh"),
}


# The config's model_type where the arrays' names are a table's.
MODEL_TYPES = {
    HF_VIT.name: ("vit", "deit", "vit_mae", "ijepa"),
    HF_DINOV2.name: ("dinov2", "dinov2_with_registers"),
    HF_DINOV3.name: ("dinov3_vit",),
    HF_SIGLIP.name: ("siglip", "siglip_vision_model"),
}
RESAMPLE = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers
ROPE_BASE = 100.0
Q_BIAS = re.compile(r"(.*\battention)\.q_proj\.bias")


def with_key_biases(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """DINOv3's keys have no bias, which is a bias of zero."""
    out = dict(arrays)
    for name, array in arrays.items():
        if match := Q_BIAS.fullmatch(name):
            out.setdefault(f"{match[1]}.k_proj.bias", np.zeros_like(array))
    return out


def facts(
    layout: Layout,
    config: Mapping[str, Any],
    preprocessor: Mapping[str, Any],
    params: Params,
) -> Facts:
    """Of a folder's config.json and preprocessor_config.json ({} where missing).

    Raises:
      ValueError: an activation or a kind of model that is not supported, a damaged file.
    """
    told = Told(config)
    _check_type(layout, told)
    vision = told.part("vision_config") if told.values.get("vision_config") else told
    heads, eps, activation = DEFAULTS[layout.name]
    if "hidden_act" in vision.values:
        activation = vision.get("hidden_act", "a text")
    gated = vision.get("use_gated_mlp", "true or false", False)
    if gated and activation == "silu":
        activation = "gelu"  # SwiGLU has its own; this one is in no use
    elif activation not in ACTIVATIONS or gated:
        raise ValueError(
            f"config.json has hidden_act={activation!r}; only {', '.join(ACTIVATIONS)} are known."
        )
    known = {
        "num_heads": vision.get(
            "num_attention_heads", "a whole number from 1", heads if config else None
        ),
        "norm_eps": vision.get("layer_norm_eps", "a positive number", eps),
        "activation": ACTIVATIONS[activation],
        "image_size": pair(vision.get("image_size", "a size in pixels")),
        "final_norm": True,
    }
    if config:
        known["depth"] = vision.get("num_hidden_layers", "a whole number from 1", DEPTH)
        known["qkv_bias"] = _qkv_bias(layout, vision)
    if layout is HF_DINOV3:
        known["pos_embed"] = "rope2d"
        if (theta := vision.get("rope_theta", "a number", ROPE_BASE)) != ROPE_BASE:
            raise ValueError(f"config.json has rope_theta={theta}, not {ROPE_BASE}.")
    pool, dropped = _pool(layout, params)
    if pool == "cls_tanh" and (act := vision.get("pooler_act", "a text", "tanh")) != "tanh":
        raise ValueError(f"config.json has pooler_act={act!r}; only 'tanh' is known.")
    notes = [] if config else [f"activation {activation!r}, eps {eps}: no config.json tells them"]
    notes += _headless(told, params)
    resize = Told(preprocessor, "preprocessor_config.json")
    if "image_mean" not in preprocessor and resize.get("do_normalize", "true or false", True):
        notes.append("normalisation by 0.5: no preprocessor_config.json tells it")
    mean, std = _normalisation(resize)
    crop_fraction, interpolation, more = _resize(resize)
    notes += more
    return Facts(
        pool=pool,
        known=known,
        mean=mean,
        std=std,
        crop_fraction=crop_fraction,
        interpolation=interpolation,
        class_names=_class_names(told, params),
        dropped=dropped,
        notes=notes,
    )


def _qkv_bias(layout: Layout, vision: Told) -> bool:
    """Whether the class has these biases: SigLIP's always does, DINOv3's has a word for each."""
    if layout is HF_SIGLIP:
        return True
    words = ("query_bias", "value_bias") if layout is HF_DINOV3 else ("qkv_bias",)
    return any(vision.get(word, "true or false", True) for word in words)


def _headless(config: Told, params: Params) -> list[str]:
    """A note of a head that the config promises and that is not there."""
    promised = [x for x in config.get("architectures", "texts", ()) if "ForImageClass" in x]
    if not promised or f"{HEAD}/kernel" in params:
        return []
    return [f"no head: config.json says {promised[0]}, and there is no classifier in the weights"]


def _check_type(layout: Layout, config: Told) -> None:
    """Other classes have the same names for other functions."""
    for part in (config, config.part("vision_config")):
        kind = part.get("model_type", "a text")
        if kind is not None and kind not in MODEL_TYPES[layout.name]:
            raise ValueError(
                f"config.json has model_type={kind!r}; of {layout.name}'s names those of "
                f"{', '.join(MODEL_TYPES[layout.name])} are read."
            )


def _normalisation(preprocessor: Told) -> tuple[tuple, tuple]:
    """Mean and deviation where white is 1: theirs are of pixels after `rescale_factor`."""
    mean = tuple(preprocessor.get("image_mean", "three numbers", HALF))
    std = tuple(preprocessor.get("image_std", "three positive numbers", HALF))
    if not preprocessor.get("do_normalize", "true or false", True):
        mean, std = (0.0,) * 3, (1.0,) * 3
    white = 255.0
    if preprocessor.get("do_rescale", "true or false", True):
        white *= preprocessor.get("rescale_factor", "a positive number", 1 / 255)
    if abs(white - 1) < 1e-6:
        return mean, std
    return tuple(x / white for x in mean), tuple(x / white for x in std)


def _resize(preprocessor: Told) -> tuple[float | None, str, list[str]]:
    """`Spec`'s crop_fraction and interpolation, and what they leave out."""
    if not preprocessor.values:
        return 0.875, "bilinear", []
    notes = []
    filtered = preprocessor.get("resample", "a whole number from 0", 2)
    if filtered not in RESAMPLE:
        notes.append(f"bilinear resize: resample={filtered} of the preprocessor is not supported")
    if not preprocessor.get("do_resize", "true or false", True):
        notes.append("images are resized: the preprocessor takes them as they are")
    sizes = "a size or an object of sizes"
    size, crop = (preprocessor.get(key, sizes, 224) for key in ("size", "crop_size"))
    cropped = preprocessor.get("do_center_crop", "true or false", False)
    crop = max(crop.values()) if isinstance(crop, Mapping) else crop
    stretched = not isinstance(size, Mapping) or "shortest_edge" not in size
    sides = list(size.values()) if isinstance(size, Mapping) else [size]
    if stretched and not cropped:
        return None, RESAMPLE.get(filtered, "bilinear"), notes
    if stretched:
        notes.append("the resize keeps the image's shape: the preprocessor stretches, then crops")
    edge = size["shortest_edge"] if not stretched else max(sides)
    fraction = min(crop / edge, 1.0) if cropped else 1.0
    return fraction, RESAMPLE.get(filtered, "bilinear"), notes


def _pool(layout: Layout, params: Params) -> tuple[str, dict[str, str]]:
    """The pooling of the class that these are the weights of, and what that class does not use."""
    has_head = f"{HEAD}/kernel" in params
    if layout is HF_SIGLIP:
        if has_head:
            why = "SiglipForImageClassification averages the patches instead"
            return "gap", {name: why for name in params if name.startswith("pool/")}
        return ("map" if "pool/probe" in params else "none"), {}
    if layout is HF_DINOV3:
        return "cls", {}
    if layout is HF_DINOV2:
        return ("cls_gap" if has_head else "cls"), {}
    if f"{HEAD_DIST}/kernel" in params:
        return "cls_dist", {}
    if "backbone/cls_token" not in params:
        why = "IJepaModel's pooler is not trained"
        dropped = {name: why for name in params if name.startswith("pool/")}
        return ("gap" if has_head else "none"), dropped
    if has_head:
        why = "ViTForImageClassification reads the class token itself"
        return "cls", {name: why for name in params if name.startswith("pool/")}
    return ("cls_tanh" if "pool/dense/kernel" in params else "none"), {}


def _class_names(config: Told, params: Params) -> tuple[str, ...]:
    names = config.get("id2label", "an object", {})
    if f"{HEAD}/kernel" not in params or not names:
        return ()
    if strange := [index for index in names if not str(index).isdecimal()]:
        raise config.damaged(f"id2label has {strange[0]!r} for a logit's number")
    labels = {int(index): str(name) for index, name in names.items()}
    count = params[f"{HEAD}/kernel"].shape[1]
    if sorted(labels) != list(range(count)):
        raise ValueError(
            f"config.json has {len(labels)} labels, the head {count} logits; make them as many."
        )
    return tuple(labels[index] for index in range(count))


@dataclasses.dataclass(frozen=True)
class Target:
    """One of transformers' classes.

    Attributes:
      architecture: its name.
      model_type: of its config.
      layout: its table.
      prefix: before every name but the heads'.
    """

    architecture: str
    model_type: str
    layout: Layout
    prefix: str


VIT = Target("ViTForImageClassification", "vit", HF_VIT, "vit.")
VIT_MODEL = Target("ViTModel", "vit", HF_VIT, "")
DEIT = Target("DeiTForImageClassification", "deit", HF_VIT, "deit.")
DEIT_TEACHER = Target("DeiTForImageClassificationWithTeacher", "deit", HF_VIT, "deit.")
DINOV2 = Target("Dinov2ForImageClassification", "dinov2", HF_DINOV2, "dinov2.")
DINOV2_MODEL = Target("Dinov2Model", "dinov2", HF_DINOV2, "")
REGISTERS = Target(
    "Dinov2WithRegistersForImageClassification",
    "dinov2_with_registers",
    HF_DINOV2,
    "dinov2_with_registers.",
)
DINOV3_MODEL = Target("DINOv3ViTModel", "dinov3_vit", HF_DINOV3, "")
REGISTERS_MODEL = Target("Dinov2WithRegistersModel", "dinov2_with_registers", HF_DINOV2, "")
IJEPA = Target("IJepaForImageClassification", "ijepa", HF_VIT, "ijepa.")
IJEPA_MODEL = Target("IJepaModel", "ijepa", HF_VIT, "")
SIGLIP_MODEL = Target("SiglipVisionModel", "siglip_vision_model", HF_SIGLIP, "vision_model.")

FEATURES = (*(VIT_MODEL, IJEPA_MODEL, DINOV2_MODEL, REGISTERS_MODEL, DINOV3_MODEL, SIGLIP_MODEL),)
TARGETS = (VIT, DEIT, DEIT_TEACHER, DINOV2, REGISTERS, IJEPA, *FEATURES)


def choose(spec: Spec) -> Target:
    """The class that computes what this model computes.

    Raises:
      ValueError: there is none.
    """
    b = spec.backbone
    wanted = {"norm": "layernorm", "qk_norm": False, "parallel": False, "final_norm": True}
    for key, value in wanted.items():
        if b[key] != value:
            raise _no_class(f"{key}={b[key]!r}")
    headless = spec.pool == "cls" and not spec.num_classes
    if b["pos_embed"] == "rope2d" and headless and b["layer_scale"] and not b["dist_token"]:
        return DINOV3_MODEL
    if b["pos_embed"] not in ("learned", "sincos2d") or spec.hidden_dim:
        raise _no_class(f"hidden_dim={spec.hidden_dim}, pos_embed={b['pos_embed']!r}")
    if not b["cls_token"]:
        if b["layer_scale"] or b["mlp"] != "mlp" or b["num_reg_tokens"]:
            raise _no_class("LayerScale, SwiGLU or registers without a class token")
        return _without_cls(spec)
    if b["dist_token"]:
        if spec.pool not in ("cls", "cls_dist") or not spec.num_classes:
            raise _no_class(f"pool={spec.pool!r} beside a distillation token")
        return DEIT if spec.pool == "cls" else DEIT_TEACHER
    plain = not (b["layer_scale"] or b["mlp"] != "mlp" or b["num_reg_tokens"])
    if plain and spec.pool == "cls" and spec.num_classes:
        return VIT
    if plain and spec.pool in ("cls_tanh", "none") and not spec.num_classes:
        return VIT_MODEL
    if spec.pool in ("cls", "gap", "cls_gap") and (spec.num_classes or spec.pool == "cls"):
        if len(set(grid_of(b))) > 1:  # Dinov2's class takes its table for a square
            raise _no_class("LayerScale, SwiGLU, registers or a mean on a grid that is no square")
        registers = b["num_reg_tokens"]
        if spec.num_classes:
            return REGISTERS if registers else DINOV2
        return REGISTERS_MODEL if registers else DINOV2_MODEL
    raise _no_class(f"pool={spec.pool!r} with {spec.num_classes} classes")


def _without_cls(spec: Spec) -> Target:
    """IJepa's classifier averages the patches, SigLIP's tower attends to them."""
    b = spec.backbone
    if spec.pool == "gap" and spec.num_classes:
        return IJEPA
    if spec.pool == "none" and not spec.num_classes:
        return IJEPA_MODEL
    if spec.pool != "map" or spec.num_classes:
        raise _no_class(f"pool={spec.pool!r} with {spec.num_classes} classes")
    if not b["qkv_bias"] or any(len(set(b[key])) > 1 for key in ("image_size", "patch_size")):
        raise _no_class("attention pooling of images that are no squares, or without qkv bias")
    return SIGLIP_MODEL


def _no_class(what: str) -> ValueError:
    return ValueError(
        f"transformers has no ViT class for {what}; use --format=timm or safetensors."
    )


def expand(params: Params, spec: Spec, layout: Layout) -> Params:
    """Adds what the class has and our model does without: the same function in more numbers."""
    params = dict(params)
    b = spec.backbone
    if b["pos_embed"] == "sincos2d":
        rows = b["cls_token"] + b["dist_token"]
        table = np.asarray(sincos2d(grid_of(b), b["dim"]))
        params["backbone/pos_embed"] = np.pad(table, ((rows, 0), (0, 0)))
    if layout is HF_DINOV2:
        for i in range(b["depth"]):
            for name in ("ls1", "ls2"):
                params.setdefault(
                    f"backbone/blocks/{i}/{name}/gamma", np.ones(b["dim"], np.float32)
                )
        if spec.num_classes and spec.pool != "cls_gap":  # their head also reads the other half
            kernel = params[f"{HEAD}/kernel"]
            halves = [kernel, np.zeros_like(kernel)]
            order = 1 if spec.pool == "cls" else -1
            params[f"{HEAD}/kernel"] = np.concatenate(halves[::order])
    return params


def reduce(params: Params, spec: Spec, layout: Layout) -> Params | None:
    """The inverse of `expand`; None if `spec` is not of these numbers: they were trained since."""
    whole, params = params, dict(params)
    if spec.backbone["pos_embed"] == "sincos2d":
        params.pop("backbone/pos_embed", None)
    if not spec.backbone["layer_scale"]:
        params = {name: x for name, x in params.items() if not name.endswith("/gamma")}
    kernel = params.get(f"{HEAD}/kernel")
    if kernel is not None and len(kernel) == 2 * spec.backbone["dim"] and spec.pool != "cls_gap":
        first, second = np.split(kernel, 2)
        params[f"{HEAD}/kernel"] = first if spec.pool == "cls" else second
    shapes = {name: array.shape for name, array in params.items()}
    if shapes != params_of_shapes(make_model(spec)):
        return None
    again = expand(params, spec, layout)
    same = again.keys() == whole.keys()
    return params if same and all(np.array_equal(again[k], whole[k]) for k in whole) else None


def export(params: Params, spec: Spec) -> tuple[Params, dict[str, Any], dict[str, Any]]:
    """(arrays, config.json, preprocessor_config.json) of a model.

    Raises:
      ValueError: transformers has no class that computes this.
    """
    target = choose(spec)
    params = expand(params, spec, target.layout)
    b = spec.backbone
    arrays = write(_layout(target, b["mlp"]), params, num_heads=b["num_heads"])
    if target.layout is HF_DINOV2:  # which the class has, and masked pretraining alone reads
        arrays["embeddings.mask_token"] = np.zeros((1, b["dim"]), np.float32)
    if target is DINOV3_MODEL:
        keys = [name for name in arrays if name.endswith("k_proj.bias")]
        if not any(np.any(arrays[name]) for name in keys):
            arrays = {name: x for name, x in arrays.items() if name not in keys}
        arrays["embeddings.mask_token"] = np.zeros((1, 1, b["dim"]), np.float32)
    if target is DEIT_TEACHER:
        renames = {f"classifier.{leaf}": f"cls_classifier.{leaf}" for leaf in ("weight", "bias")}
        arrays = {renames.get(name, name): array for name, array in arrays.items()}
    heads = ("classifier.", "cls_classifier.", "distillation_classifier.")
    arrays = {
        name if name.startswith(heads) else target.prefix + name: array
        for name, array in arrays.items()
    }
    config = _config(spec, target)
    if target is DINOV3_MODEL:
        config |= _dinov3(arrays, b)
    return arrays, config, preprocessor(spec)


def _layout(target: Target, mlp: str) -> Layout:
    """The table; of an MLP's names there are two kinds, and here is only one kind of MLP."""
    other = "gate_proj" if mlp == "mlp" else ".mlp.fc"
    rows = tuple(row for row in target.layout.rows if other not in row.theirs)
    return dataclasses.replace(target.layout, rows=rows)


def _config(spec: Spec, target: Target) -> dict[str, Any]:
    b = spec.backbone
    activation = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}[b["activation"]]
    vision = {
        "hidden_size": b["dim"],
        "num_hidden_layers": b["depth"],
        "num_attention_heads": b["num_heads"],
        "hidden_act": activation,
        "layer_norm_eps": b["norm_eps"],
        "image_size": _side(b["image_size"]),
        "patch_size": _side(b["patch_size"]),
        "num_channels": 3,
    }
    if target.layout is HF_DINOV2:
        vision |= {"mlp_ratio": _mlp_ratio(b), "use_swiglu_ffn": b["mlp"] == "swiglu"}
        vision |= {"layerscale_value": 1.0}
        if b["num_reg_tokens"]:
            vision["num_register_tokens"] = b["num_reg_tokens"]
    else:
        vision["intermediate_size"] = b["mlp_dim"]
    if target.layout is HF_SIGLIP:
        vision["vision_use_head"] = True
    else:
        vision["qkv_bias"] = b["qkv_bias"]
    config = {"architectures": [target.architecture], "model_type": target.model_type}
    config |= vision
    if spec.num_classes:
        names = spec.class_names or [f"class {i}" for i in range(spec.num_classes)]
        config["id2label"] = {str(i): name for i, name in enumerate(names)}
        config["label2id"] = {name: i for i, name in enumerate(names)}
    # transformers passes this over; it makes the way back exact.
    return config | {"dtype": "float32", "vit_jax": spec.to_json()}


def _dinov3(arrays: Params, b: Mapping[str, Any]) -> dict[str, Any]:
    biased = {key: f"layer.0.attention.{key[0]}_proj.bias" for key in ("query", "key", "value")}
    return {
        **{f"{key}_bias": name in arrays for key, name in biased.items()},
        "num_register_tokens": b["num_reg_tokens"],
        "use_gated_mlp": b["mlp"] == "swiglu",
        **({"hidden_act": "silu"} if b["mlp"] == "swiglu" else {}),
        "rope_theta": ROPE_BASE,
    }


def _side(size: tuple[int, int]) -> int | list[int]:
    return size[0] if size[0] == size[1] else list(size)


def _mlp_ratio(b: Mapping[str, Any]) -> int:
    """Dinov2's config has a whole ratio; its SwiGLU keeps two thirds, rounded up to eights."""
    for ratio in range(1, 17):
        hidden = b["dim"] * ratio
        if b["mlp"] == "swiglu":
            hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
        if hidden == b["mlp_dim"]:
            return ratio
    raise _no_class(f"mlp_dim={b['mlp_dim']} at dim={b['dim']}")


def preprocessor(spec: Spec) -> dict[str, Any]:
    """preprocessor_config.json: resize, crop where the model's evaluation does, normalise.

    The resize has one number for the shorter edge: of models for images that are no squares it is
    their longer side's, so that a photo of another shape is cut closer than here.
    """
    height, width = spec.backbone["image_size"]
    size = {"height": height, "width": width}
    resize: dict[str, Any] = {"image_processor_type": "ViTImageProcessor", "size": size}
    if spec.crop_fraction is not None:
        edge = max(height, width)
        resize = {
            "image_processor_type": "BitImageProcessor",
            "size": {"shortest_edge": max(int(edge / spec.crop_fraction + 0.5), edge)},
            "do_center_crop": True,
            "crop_size": size,
            "do_convert_rgb": True,
        }
    resample = {name: number for number, name in RESAMPLE.items()}[spec.interpolation]
    return resize | {
        "do_resize": True,
        "resample": resample,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
    }


def run(folder: epath.Path, model: Model, images: np.ndarray) -> Answer:
    """What transformers answers on uint8 images, by the class that the folder names.

    Raises:
      ImportError: transformers or torch is missing.
    """
    import torch
    import transformers

    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    target = next(t for t in TARGETS if t.architecture == architecture)
    auto = transformers.AutoModelForImageClassification
    if target in FEATURES:
        auto = transformers.AutoModel
    pixels = np.asarray(model.preprocess(jnp.asarray(images))).transpose(0, 3, 1, 2)
    with torch.no_grad():
        made = auto.from_pretrained(str(folder)).eval()
        pixels = torch.from_numpy(np.ascontiguousarray(pixels))
        backbone = dict(made.named_children()).get(target.prefix.rstrip("."), made)
        answer = backbone(pixels)
        tokens = answer.last_hidden_state.numpy()
        logits = made(pixels).logits.numpy() if target not in FEATURES else tokens
        if target in FEATURES and not isinstance(model.pool, AllTokens):
            logits = answer.pooler_output.numpy()
    return Answer(f"{version('transformers')}, {version('torch')}", logits, tokens)
