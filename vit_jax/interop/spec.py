"""What a model is without its numbers: read off arrays or a module, kept as JSON, built again."""

import dataclasses
import inspect
import json
import math
from collections.abc import Container, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vit_jax.checkpoint import unstack
from vit_jax.data.decode import INTERPOLATIONS
from vit_jax.interop.facts import Told
from vit_jax.interop.pools import make_any_pool, pool_name
from vit_jax.interop.tables import Params, depth_of
from vit_jax.models.heads import Head, make_head
from vit_jax.models.model import Model
from vit_jax.models.vit import VARIANTS, VisionTransformer, make_vit
from vit_jax.preprocess import HALF, Preprocess
from vit_jax.tree import STACKED, named_leaves

FORMAT_VERSION = 2
SHAPE = ("dim", "depth", "num_heads", "mlp_dim")  # what a variant's name stands for
HEAD_DIM = 64  # of every published ViT but a few; what is taken where no file tells the heads


# What a spec's backbone says, and what each word is, in `Told`'s kinds.
BACKBONE = {
    **dict.fromkeys(("image_size", "patch_size"), "height and width"),
    **dict.fromkeys(SHAPE, "a whole number from 1"),
    **dict.fromkeys(("cls_token", "dist_token", "qk_norm"), "true or false"),
    **dict.fromkeys(("qkv_bias", "parallel", "final_norm"), "true or false"),
    "num_reg_tokens": "a whole number from 0",
    **dict.fromkeys(("pos_embed", "mlp", "activation", "norm"), "a text"),
    "norm_eps": "a positive number",
    "layer_scale": "a number",
}
REST = {
    "pool": "a text",
    **dict.fromkeys(("num_classes", "hidden_dim"), "a whole number from 0"),
    **{"mean": "three numbers", "std": "three positive numbers"},
    "crop_fraction": "a positive number",
    "interpolation": "a text",
    "class_names": "texts",
}


@dataclasses.dataclass(frozen=True)
class Spec:
    """A model without its numbers.

    Attributes:
      backbone: `VisionTransformer`'s keyword arguments.
      pool: `make_pool`'s name.
      num_classes: 0 for no head.
      hidden_dim: of the head's hidden layer, 0 for none.
      mean, std: of the preprocessing, in units where white is 1.
      crop_fraction: of the resized image, how much the model sees (its centre); None if images
        are stretched to the model's size instead.
      interpolation: of that resize, one of `decode.INTERPOLATIONS`.
      class_names: in the order of the logits; empty if nobody knows them.
    """

    backbone: dict[str, Any]
    pool: str
    num_classes: int = 0
    hidden_dim: int = 0
    mean: tuple[float, ...] = HALF
    std: tuple[float, ...] = HALF
    crop_fraction: float | None = 0.875
    interpolation: str = "bilinear"
    class_names: tuple[str, ...] = ()

    def __post_init__(self):
        if self.class_names and len(self.class_names) != self.num_classes:
            raise ValueError(
                f"there are {len(self.class_names)} class names but {self.num_classes} logits; "
                "make them as many."
            )

    def to_json(self) -> str:
        """One line, with the version of the format."""
        return json.dumps({"version": FORMAT_VERSION} | dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str, source: Any) -> "Spec":
        """The inverse; `source` is for messages.

        Raises:
          ValueError: written by a newer vit_jax, or no spec.
        """
        damaged = f"{source}: its description of the model is damaged"
        try:
            values = json.loads(text)
            version = values.pop("version")
        except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{damaged}.") from error
        if type(version) is not int or version < 1:
            raise ValueError(f"{damaged} (version={version!r} is no whole number).")
        if version > FORMAT_VERSION:
            raise ValueError(
                f"{source} was written by a newer vit_jax (format {version}, this one reads up to "
                f"{FORMAT_VERSION}); upgrade: pip install -U vit-jax."
            )
        told = Told(values, "description of the model")
        try:
            _check_words(told.part("backbone"), BACKBONE, optional=())
            _check_words(told, {"backbone": "an object"} | REST, optional=REST)
            if values["interpolation"] not in INTERPOLATIONS:
                raise told.damaged(f"interpolation={values['interpolation']!r} is unknown")
            spec = cls(**{key: _tuples(value) for key, value in values.items()})
            make_model(spec)  # knows which words there are, and which go together
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
        return spec


def config_of(spec: Spec) -> dict[str, Any]:
    """The values for a recipe that goes on from such weights: 'model', 'pool', 'mean', 'std'.

    Poolings that only imported models have become the nearest that can be trained.
    """
    options = dict(spec.backbone)
    height, width = options.pop("patch_size")
    patch = f"{height}x{width}" if height != width else f"{height}"
    shape = tuple(options[key] for key in SHAPE)
    name = next((name for name, row in VARIANTS.items() if row == shape), None)
    if name is not None:
        options = {key: x for key, x in options.items() if key not in SHAPE}
    known = inspect.signature(make_vit).parameters
    options = {key: x for key, x in options.items() if x != known[key].default}
    pools = {"none": nearest_pool(spec), "cls_gap": "cls", "cls_tanh": "cls"}
    return {
        "model": {"variant": f"{name or 'Ti'}/{patch}"} | options,
        "pool": pools.get(spec.pool, spec.pool),
        "mean": tuple(spec.mean),
        "std": tuple(spec.std),
    }


def nearest_pool(spec: Spec) -> str:
    """What gives one vector an image where the model answers all its tokens."""
    return "cls" if spec.backbone["cls_token"] else "gap"


def _check_words(told: Told, kinds: Mapping[str, str], *, optional: Container[str]) -> None:
    """Every word of these is there and of its kind, and there is no other."""
    for key, kind in kinds.items():
        if key not in told.values or (told.get(key, kind) is None and key not in optional):
            raise told.damaged(f"{key} is missing")
    if strange := sorted(set(told.values) - set(kinds)):
        raise told.damaged(f"{strange[0]!r} is unknown")


def _tuples(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _tuples(part) for key, part in value.items()}
    return tuple(value) if isinstance(value, list) else value


def grid_of(backbone: Mapping[str, Any]) -> tuple[int, int]:
    """Patches in height and width.

    Raises:
      ValueError: they do not fill the image.
    """
    sides = list(zip(backbone["image_size"], backbone["patch_size"], strict=True))
    if any(side % patch or side < patch for side, patch in sides):
        raise ValueError(
            f"image_size={backbone['image_size']} must be a multiple of "
            f"patch_size={backbone['patch_size']}."
        )
    return tuple(side // patch for side, patch in sides)


def infer_backbone(
    params: Params, known: Mapping[str, Any], *, bare: bool = True
) -> tuple[Params, dict, list[str]]:
    """`VisionTransformer`'s arguments from shapes.

    Args:
      params: by our names.
      known: arguments that the source tells; None values count as not told.
      bare: whether the table may lack rows for the prefix tokens, as DeiT-III's does.

    Returns:
      The parameters with a position row for every prefix token (zeros where the source adds
      none), the arguments, and notes of what was assumed.

    Raises:
      ValueError: the arrays are not those of one Vision Transformer.
    """
    known = {key: value for key, value in known.items() if value is not None}
    for name in ("backbone/patch_embed/kernel", "backbone/blocks/0/mlp/fc2/kernel"):
        if name not in params:
            raise ValueError(
                f"there is nothing for {name}: no Vision Transformer, or a part of one."
            )
    _check_axes(params)
    *patch_size, channels, dim = params["backbone/patch_embed/kernel"].shape
    if channels != 3:
        raise ValueError(f"the patch embedding takes {channels} channels; only 3 are supported.")
    block = {k.split("/", 3)[3]: v for k, v in params.items() if k.startswith("backbone/blocks/0/")}
    hidden = block["mlp/fc2/kernel"].shape[0]
    options = {
        "patch_size": tuple(patch_size),
        "dim": dim,
        "depth": depth_of(params),
        "mlp_dim": hidden,
        "cls_token": "backbone/cls_token" in params,
        "dist_token": "backbone/dist_token" in params,
        "num_reg_tokens": len(params.get("backbone/reg_tokens", ())),
        "mlp": "swiglu" if np.shape(block.get("mlp/fc1/kernel"))[1:] == (2 * hidden,) else "mlp",
        "norm": "layernorm" if "norm1/bias" in block else "rmsnorm",
        "qk_norm": "attn/q_norm/scale" in block,
        "qkv_bias": "attn/qkv/bias" in block,
        "parallel": "norm2/scale" not in block,
        "layer_scale": 1.0 if "ls1/gamma" in block else 0.0,
        "final_norm": "backbone/norm/scale" in params,
    }
    for key in ("depth", "qkv_bias", "final_norm"):
        if options[key] != known.get(key, options[key]):
            raise ValueError(
                f"the arrays are those of {key}={options[key]}, the model has {key}={known[key]}: "
                "some are missing, or the files do not belong together; fetch them again, whole."
            )
    notes = []
    if "num_heads" not in known:
        options["num_heads"], note = _guess_heads(dim)
        notes.append(note)
    if "depth" not in known:
        notes += _shallow(options)
    params, places, more = _place(params, options, known, bare)
    return params, options | places | known | {"image_size": places["image_size"]}, notes + more


def _check_axes(params: Params) -> None:
    """As many axes as every model of ours has under these names."""
    for name, array in params.items():
        two = name.endswith(("/kernel", "_token", "_tokens", "/pos_embed", "/probe"))
        axes = 4 if name == "backbone/patch_embed/kernel" else 2 if two else 1
        if array.ndim != axes:
            raise ValueError(f"{name} has the shape {array.shape}, not {axes} axes.")


def _guess_heads(dim: int) -> tuple[int, str]:
    if dim % HEAD_DIM:
        raise ValueError(f"dim={dim} is no multiple of {HEAD_DIM}: tell the heads by --num_heads.")
    heads = dim // HEAD_DIM
    return heads, f"num_heads={heads}: {HEAD_DIM} channels a head, as is the custom; or --num_heads"


def _shallow(options: Mapping[str, Any]) -> list[str]:
    """A note of blocks that may be missing: the model that is known for its widths has more."""
    depth, widths = options["depth"], (options["dim"], options["mlp_dim"])
    for name, (dim, wanted, _, mlp_dim) in VARIANTS.items():
        if widths == (dim, mlp_dim) and depth < wanted:
            return [f"depth={depth}: ViT-{name}, as wide, has {wanted}; the file may be cut short"]
    return []


def _place(params, options, known, bare) -> tuple[Params, dict[str, Any], list[str]]:
    """The table with all its rows, image_size and pos_embed."""
    patch = options["patch_size"]
    size = known.get("image_size")
    if "backbone/pos_embed" not in params:
        kind = known.get("pos_embed", "none")
        notes = [] if size else [f"image_size=224: no table tells it; pos_embed={kind!r}"]
        side = [max(224 // p, 1) * p for p in patch]
        return params, {"image_size": tuple(size or side), "pos_embed": kind}, notes
    table = params["backbone/pos_embed"]
    prefix = options["cls_token"] + options["dist_token"]
    registers = options["num_reg_tokens"]
    grids = [tuple(s // p for s, p in zip(size, patch, strict=True))] if size else []
    for rows in dict.fromkeys([prefix + registers, prefix, *([0] if bare else [])]):
        side = math.isqrt(max(len(table) - rows, 0))
        square = bool(side) and side * side == len(table) - rows
        grid = next((g for g in grids if math.prod(g) == len(table) - rows), None)
        if grid is None and not square:
            continue
        grid = grid or (side, side)
        table = _all_rows(params, table, prefix, registers if rows > prefix else 0, rows)
        places = {
            "image_size": tuple(g * p for g, p in zip(grid, patch, strict=True)),
            "pos_embed": "learned",
        }
        notes = []
        if size and tuple(size) != places["image_size"]:
            notes = [f"image_size={places['image_size']}: of {tuple(size)} the rest is not read"]
        return params | {"backbone/pos_embed": table}, places, notes
    raise ValueError(
        f"the position table of {len(table)} rows is no square grid with {prefix} prefix tokens; "
        "tell the image's height and width as image_size."
    )


def _all_rows(params, table, prefix, registers, rows) -> np.ndarray:
    """[prefix + patches, dim]; rows of registers must be zero, missing ones become zero."""
    if registers:
        if np.any(table[prefix : prefix + registers]):
            raise ValueError("the registers have positions of their own; that is not supported.")
        return np.concatenate([table[:prefix], table[prefix + registers :]])
    if rows or not prefix:
        return table
    return np.concatenate([np.zeros((prefix, table.shape[1]), table.dtype), table])


def make_model(spec: Spec, *, attention: str = "auto") -> Model:
    """The module without numbers: its leaves are `jax.ShapeDtypeStruct`s.

    `attention` is how it is computed, see `VisionTransformer`.
    """

    def make() -> Model:
        rngs = nnx.Rngs(0)
        backbone = VisionTransformer(**spec.backbone, attention=attention, rngs=rngs)
        pool = make_any_pool(spec.pool, backbone, rngs=rngs)
        head = None
        if spec.num_classes:
            width = backbone.dim * (2 if spec.pool == "cls_gap" else 1)
            options = {"hidden_dim": spec.hidden_dim, "rngs": rngs}
            head = make_head(spec.pool, width, spec.num_classes, **options)
        return Model(backbone, pool, head, Preprocess(spec.mean, spec.std))

    return nnx.eval_shape(make)


def params_of_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Our name -> shape of a model that does not scan."""
    return {name: tuple(leaf.shape) for name, leaf in _leaves(model).items()}


def misfits(model: Model, params: Mapping[str, np.ndarray]) -> list[str]:
    """What `fill` refuses: parameters that are missing, left over, or of another shape."""
    leaves = _leaves(model)
    params = _stacked(params, leaves)
    wanted = {name: tuple(x.shape) for name, x in leaves.items()}
    wrong = [f"{name} is missing" for name in wanted.keys() - params.keys()]
    wrong += [f"{name} is left over" for name in params.keys() - wanted.keys()]
    wrong += [
        f"{name} is {params[name].shape}, wanted {wanted[name]}"
        for name in wanted.keys() & params.keys()
        if params[name].shape != wanted[name]
    ]
    return sorted(wrong)


def fill(model: Model, params: Mapping[str, np.ndarray]) -> Model:
    """The module with these numbers.

    Raises:
      ValueError: parameters are missing, left over, or of another shape; all are named.
    """
    if wrong := misfits(model, params):
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        head = all(line.startswith("head/") for line in wrong)
        raise ValueError(
            f"the weights do not fit the model: {'; '.join(wrong[:5])}{more}; "
            + ("num_classes=0 leaves the head out." if head else "fetch them again, whole.")
        )
    leaves = _leaves(model)
    params = _stacked(params, leaves)
    graphdef, state = nnx.split(model)
    tree = nnx.to_pure_dict(state)
    arrays = [jnp.asarray(params[name], leaf.dtype) for name, leaf in leaves.items()]
    return nnx.merge(graphdef, jax.tree.unflatten(jax.tree.structure(tree), arrays))


def params_of(model: Model) -> Params:
    """A model's arrays by our names, on the host, blocks unstacked."""
    return {name: np.asarray(x) for name, x in unstack(_leaves(model)).items()}


def spec_of(model: Model, class_names: tuple[str, ...] = ()) -> Spec:
    """What a module is.

    Raises:
      ValueError: it pools in a way that has no name.
    """
    backbone, head = model.backbone, model.head
    num_classes = 0 if head is None else head.fc.kernel.shape[-1]
    hidden = head.pre_logits if isinstance(head, Head) else None
    return Spec(
        backbone=arguments_of(backbone),
        pool=pool_name(model.pool),
        num_classes=num_classes,
        hidden_dim=0 if hidden is None else hidden.kernel.shape[-1],
        mean=tuple(model.preprocess.mean),
        std=tuple(model.preprocess.std),
        class_names=tuple(class_names),
    )


def arguments_of(vit: VisionTransformer) -> dict[str, Any]:
    """What decides the numbers; how they are computed (scan, remat, dtype, drop rates) does not."""
    block = vit.blocks if vit.scan else vit.blocks[0]
    return {
        "image_size": vit.image_size,
        "patch_size": vit.patch_size,
        "dim": vit.dim,
        "depth": vit.depth,
        "num_heads": vit.num_heads,
        "mlp_dim": vit.mlp_dim,
        "cls_token": vit.cls_token is not None,
        "dist_token": vit.dist_token is not None,
        "num_reg_tokens": 0 if vit.reg_tokens is None else vit.reg_tokens.shape[0],
        "pos_embed": vit.pos_kind,
        "mlp": vit.mlp_kind,
        "activation": vit.activation,
        "norm": vit.norm_kind,
        "norm_eps": vit.norm_eps,
        "qk_norm": block.attn.q_norm is not None,
        "qkv_bias": block.attn.qkv.bias is not None,
        "parallel": block.norm2 is None,
        "layer_scale": 0.0 if block.ls1 is None else 1.0,
        "final_norm": vit.norm is not None,
    }


def _leaves(model: Model) -> dict[str, Any]:
    return named_leaves(nnx.to_pure_dict(nnx.state(model)))


def _stacked(params: Mapping[str, np.ndarray], leaves: Mapping[str, Any]) -> Params:
    """Blocks stacked where the model scans over them."""
    out = dict(params)
    for name, leaf in leaves.items():
        if match := STACKED.match(name):
            parts = [f"{match[1]}/{i}/{match[2]}" for i in range(leaf.shape[0])]
            if all(part in out for part in parts):
                out[name] = np.stack([out.pop(part) for part in parts])
    return out
