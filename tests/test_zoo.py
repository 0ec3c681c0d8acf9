"""Published models: their counts and names of parameters, and what a notebook does with one."""

import fnmatch
import functools
import math
import re
from typing import NamedTuple

import jax
import numpy as np
import pytest
from flax import nnx

import vit_jax
from tests.models import reference
from vit_jax.models.vit import VARIANTS
from vit_jax.preprocess import Preprocess
from vit_jax.tree import named_leaves
from vit_jax.zoo import IMAGENET, MODELS

pytestmark = pytest.mark.slow

TINY = {"dim": 16, "depth": 1, "num_heads": 2, "mlp_dim": 24}


class Golden(NamedTuple):
    """The published count, ours, what the published one is of, and how many more that holds.

    Published counts are to as many digits as were told.
    """

    published: int
    count: int
    of: str = "all"
    more: int = 0


OF = {
    "all": lambda name: True,
    "without the head": lambda name: not name.startswith("head/"),
    "the backbone": lambda name: name.startswith("backbone/"),
    "the blocks' matrices": lambda name: "blocks/" in name and name.endswith("kernel"),
}

GOLDEN = {
    # Published to the last digit by timm and torchvision (S/32 and B/8: by timm in units of 10⁴).
    "vit_ti16": Golden(5_717_416, 5_717_416),
    "vit_s16": Golden(22_050_664, 22_050_664),
    "vit_s32": Golden(22_878_952, 22_878_952),
    # timm's vit_medium_patch16_reg4_gap_256, in units of 10⁴: at 256 pixels 59 positions more, four
    # registers for the class token, and LayerScale. Nobody published it bare.
    "vit_m16": Golden(38_880_000, 38_837_736, more=(59 + 4 - 1) * 512 + 2 * 12 * 512),
    "vit_b8": Golden(86_580_000, 86_576_872),
    "vit_b16": Golden(86_567_656, 86_567_656),
    "vit_b32": Golden(88_224_232, 88_224_232),
    "vit_l16": Golden(304_326_632, 304_326_632),
    "vit_l32": Golden(306_535_400, 306_535_400),
    "vit_h14": Golden(632_045_800, 632_045_800),
    # Millions, from the papers' tables (Alabdulmohsin et al. 2023; Zhai et al. 2022, table 2).
    "vit_so400m14": Golden(428_000_000, 428_833_704, "without the head"),
    "vit_g14": Golden(1_011_000_000, 1_037_857_384, "the backbone"),
    "vit_gg14": Golden(1_843_000_000, 1_882_797_416, "the backbone"),
    # Millions, Chen et al. 2022, table 1: with a head for JFT-3B's classes, about 30,000, ours for
    # 1,000. 29,593 classes make the published figure; all but the head is the same.
    "vit_e14": Golden(3_926_000_000, 3_875_135_720, more=(29_593 - 1000) * (1792 + 1)),
    # Millions, Dehghani et al. 2023, table 1: biases, norms, pooling and embeddings left out.
    # Those and the head, here for 1,000 classes, are the 467 M that ours counts beside them.
    "vit_22b14": Golden(21_743_000_000, 22_209_743_848, "the blocks' matrices"),
    # timm; of the distilled models in units of 10⁴.
    "deit_ti16": Golden(5_717_416, 5_717_416),
    "deit_s16": Golden(22_050_664, 22_050_664),
    "deit_b16": Golden(86_567_656, 86_567_656),
    "deit_ti16_distilled": Golden(5_910_000, 5_910_800),
    "deit_s16_distilled": Golden(22_440_000, 22_436_432),
    "deit_b16_distilled": Golden(87_340_000, 87_338_192),
    # timm, in units of 10⁴. Theirs has no position for the class token, ours a row of its own.
    "deit3_s16": Golden(22_060_000, 22_059_880, more=-384),
    "deit3_m16": Golden(38_850_000, 38_850_024, more=-512),
    "deit3_b16": Golden(86_590_000, 86_586_088, more=-768),
    "deit3_l16": Golden(304_370_000, 304_375_784, more=-1024),
    "deit3_h14": Golden(632_130_000, 632_127_720, more=-1280),
    # The files of facebook/dinov2-* at Hugging Face hold iBOT's mask token too.
    "dinov2_s14": Golden(22_056_576, 22_056_192, more=384),
    "dinov2_b14": Golden(86_580_480, 86_579_712, more=768),
    "dinov2_l14": Golden(304_368_640, 304_367_616, more=1024),
    "dinov2_g14": Golden(1_136_480_768, 1_136_479_232, more=1536),
    # timm, in units of 10⁴: it adds the class token's position to the token.
    "dinov2_s14_reg": Golden(22_060_000, 22_057_728, more=-384),
    "dinov2_b14_reg": Golden(86_580_000, 86_582_784, more=-768),
    "dinov2_l14_reg": Golden(304_370_000, 304_371_712, more=-1024),
    "dinov2_g14_reg": Golden(1_136_480_000, 1_136_485_376, more=-1536),
    # timm, in units of 10⁴ (B and 7B: DINOv3's page, in millions). Keys have no bias there.
    "dinov3_s16": Golden(21_600_000, 21_600_768, more=-12 * 384),
    "dinov3_splus16": Golden(28_690_000, 28_697_088, more=-12 * 384),
    "dinov3_b16": Golden(86_000_000, 85_668_864, more=-12 * 768),
    "dinov3_l16": Golden(303_130_000, 303_153_152, more=-24 * 1024),
    "dinov3_hplus16": Golden(840_590_000, 840_632_320, more=-32 * 1280),
    "dinov3_7b16": Golden(6_716_000_000, 6_716_030_976),
    # timm, in units of 10⁴.
    "siglip_b16": Golden(92_880_000, 92_884_224),
    "siglip_l16": Golden(315_960_000, 315_956_224),
    "siglip_so400m14": Golden(427_680_000, 427_680_704),
    # As many as timm's ViTs: the last norm only stands elsewhere (MAE's models_vit.py).
    "mae_b16": Golden(86_567_656, 86_567_656),
    "mae_l16": Golden(304_326_632, 304_326_632),
    "mae_h14": Golden(632_045_800, 632_045_800),
}


@functools.cache
def parameters(name, depth=1):
    """name -> shape, of a model of that many blocks; allocates nothing."""
    model = nnx.eval_shape(lambda: vit_jax.create_model(name, backbone={"depth": depth}))
    leaves = named_leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    return {leaf: value.shape for leaf, value in leaves.items()}


def count(name, of="all"):
    """Parameters at full depth. Blocks are alike: two depths tell the rest."""
    one, two = (
        sum(math.prod(shape) for leaf, shape in parameters(name, depth).items() if OF[of](leaf))
        for depth in (1, 2)
    )
    row = MODELS[name]
    depth = row.backbone.get("depth") or VARIANTS[row.variant.split("/")[0]][1]
    return one + (depth - 1) * (two - one)


def test_each_model_has_its_golden_counts():
    assert list(GOLDEN) == vit_jax.list_models()


@pytest.mark.parametrize("name", GOLDEN)
def test_number_of_parameters(name):
    golden = GOLDEN[name]
    published = golden.published
    assert count(name) == golden.count and MODELS[name].published == published
    digits = str(published).rstrip("0")  # as precise as it was told
    unit = 10 ** (len(str(published)) - len(digits))
    assert round((count(name, golden.of) + golden.more) / unit) * unit == published


# Names, of one block.


def names(*parts):
    """'attn/qkv bias kernel' -> attn/qkv/bias, attn/qkv/kernel."""
    found = set()
    for part in parts:
        module, *leaves = part.split()
        found |= {f"{module}/{leaf}" for leaf in leaves} or {module}
    return found


BLOCK = "backbone/blocks/0"
HEAD = names("head/fc bias kernel")
NORM = names("backbone/norm bias scale")
SCALES = names(f"{BLOCK}/ls1 gamma", f"{BLOCK}/ls2 gamma")
REGISTERS = {"backbone/reg_tokens"}
VIT = (
    HEAD
    | NORM
    | {"backbone/cls_token", "backbone/pos_embed"}
    | names(
        "backbone/patch_embed bias kernel",
        *(
            f"{BLOCK}/{module} bias kernel"
            for module in ("attn/qkv", "attn/proj", "mlp/fc1", "mlp/fc2")
        ),
        *(f"{BLOCK}/{module} bias scale" for module in ("norm1", "norm2")),
    )
)
MAP = {"pool/probe"} | names(
    *(f"pool/{module} bias kernel" for module in ("query", "key", "value", "proj")),
    *("pool/norm bias scale", "pool/mlp/fc1 bias kernel", "pool/mlp/fc2 bias kernel"),
)
# Names as patterns, the first that fits counts -> what such models have beside VIT, and lack.
FAMILIES = {
    "vit_so400m14": (MAP, {"backbone/cls_token"}),
    "vit_22b14": (
        MAP - {"pool/norm/bias"}
        | names(f"{BLOCK}/attn/q_norm scale", f"{BLOCK}/attn/k_norm scale"),
        names("backbone/cls_token", "backbone/norm bias", f"{BLOCK}/attn/qkv bias")
        | names(f"{BLOCK}/norm1 bias", f"{BLOCK}/norm2 bias scale"),
    ),
    "vit_g14": (MAP, {"backbone/cls_token"}),
    "vit_gg14": (MAP, {"backbone/cls_token"}),
    "vit_e14": (MAP, {"backbone/cls_token"}),
    "vit_*": (set(), set()),
    "deit_*_distilled": ({"backbone/dist_token"} | names("head/fc_dist bias kernel"), set()),
    "deit_*": (set(), set()),
    "deit3_*": (SCALES, set()),
    "dinov2_*_reg": (SCALES | REGISTERS, HEAD),
    "dinov2_*": (SCALES, HEAD),
    "dinov3_7b16": (
        SCALES | REGISTERS,
        HEAD | {"backbone/pos_embed", f"{BLOCK}/attn/qkv/bias"},
    ),
    "dinov3_*": (SCALES | REGISTERS, HEAD | {"backbone/pos_embed"}),
    "siglip_*": (MAP, HEAD | {"backbone/cls_token"}),
    "mae_*": (names("pool/norm bias scale"), NORM),
}
# Likewise -> dim and the MLP's width, from the papers.
WIDTHS = {
    **{"dinov2_g*": (1536, 4096), "dinov3_7b*": (4096, 8192), "dinov3_splus*": (384, 1536)},
    **{"*_so400m*": (1152, 4304), "*_22b*": (6144, 24576), "*_gg*": (1664, 8192)},
    **{"*_e14": (1792, 15360), "*_ti*": (192, 768), "*_s[13]*": (384, 1536)},
    **{"*_m*": (512, 2048), "*_b*": (768, 3072), "*_l*": (1024, 4096), "*_h*": (1280, 5120)},
    "vit_g14": (1408, 6144),
}
GATED = ("dinov2_g*", "dinov3_splus*", "dinov3_hplus*", "dinov3_7b*")


def of(name, table):
    """The value of the first pattern that fits."""
    return next(value for pattern, value in table.items() if fnmatch.fnmatchcase(name, pattern))


@pytest.mark.parametrize("name", GOLDEN)
def test_names_of_parameters(name):
    more, less = of(name, FAMILIES)
    assert less <= VIT and not more & VIT
    wanted = (VIT | more) - less
    assert parameters(name).keys() == wanted
    second = {leaf.replace("blocks/0", "blocks/1") for leaf in wanted}
    assert parameters(name, 2).keys() == wanted | second


@pytest.mark.parametrize("name", GOLDEN)
def test_shapes_of_each(name):
    dim, hidden = of(name, WIDTHS)
    patch = int(re.search(r"\d+$", name.removesuffix("_distilled").removesuffix("_reg"))[0])
    shapes, two = parameters(name), parameters(name, 2)
    gated = any(fnmatch.fnmatchcase(name, pattern) for pattern in GATED)
    assert shapes["backbone/patch_embed/kernel"] == (patch, patch, 3, dim)
    assert shapes[f"{BLOCK}/attn/qkv/kernel"] == (dim, 3 * dim)
    assert shapes[f"{BLOCK}/attn/proj/kernel"] == (dim, dim)
    assert shapes[f"{BLOCK}/mlp/fc1/kernel"] == (dim, hidden * (2 if gated else 1))
    assert shapes[f"{BLOCK}/mlp/fc2/kernel"] == (hidden, dim)
    for leaf, shape in shapes.items():
        assert two[leaf.replace("blocks/0", "blocks/1")] == shape


def test_shapes_of_parameters():
    shapes = parameters("deit_s16_distilled")
    assert shapes["backbone/cls_token"] == shapes["backbone/dist_token"] == (1, 384)
    assert shapes["backbone/pos_embed"] == (2 + 14 * 14, 384)
    shapes = parameters("dinov2_g14_reg")
    assert shapes["backbone/reg_tokens"] == (4, 1536)
    assert shapes["backbone/pos_embed"] == (1 + 37 * 37, 1536)  # registers have no place
    assert shapes[f"{BLOCK}/mlp/fc1/kernel"] == (1536, 2 * 4096)
    assert shapes[f"{BLOCK}/mlp/fc2/kernel"] == (4096, 1536)
    shapes = parameters("vit_22b14")
    assert shapes[f"{BLOCK}/attn/q_norm/scale"] == (6144 // 48,)


# In a notebook.


@pytest.mark.parametrize("name", MODELS)
def test_every_model_runs(name):
    model = nnx.eval_shape(lambda: vit_jax.create_model(name, backbone={"depth": 1}))
    graphdef, params = nnx.split(model)
    images = jax.ShapeDtypeStruct((2, *model.backbone.image_size, 3), np.uint8)

    def run(params, images):
        model = nnx.merge(graphdef, params)
        return model(images), model.features(images)

    logits, features = jax.eval_shape(run, nnx.to_pure_dict(params), images)
    width = model.backbone.dim * (2 if name.endswith("_distilled") else 1)
    assert features.shape == (2, width) and features.dtype == np.float32
    assert logits.shape == (2, MODELS[name].num_classes or width) and logits.dtype == np.float32


def test_a_model_takes_pixels_or_normalised_images():
    def make():
        options = {"num_classes": 5, "image_size": (32, 16), "backbone": TINY}
        return vit_jax.create_model("deit_ti16_distilled", **options)

    model = reference.made(make)
    assert model.preprocess == Preprocess(*IMAGENET)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 16, 3), np.uint8)
    normalised = (pixels / 255 - IMAGENET[0]) / IMAGENET[1]
    tokens = reference.encoder(model.backbone, normalised)
    features = reference.pooled("cls_dist", model.pool, tokens, model.backbone)
    run = jax.jit(lambda images: (model(images), model.features(images)))
    for images in (pixels, normalised.astype(np.float32)):
        logits, found = run(images)
        np.testing.assert_allclose(found, features, rtol=1e-4, atol=1e-4)
        wanted = reference.logits(model.head, features)
        np.testing.assert_allclose(logits, wanted, rtol=1e-4, atol=1e-4)


def test_half_precision_models_answer_float32():
    def make():
        half = TINY | {"dtype": "bfloat16"}
        return vit_jax.create_model("siglip_b16", image_size=16, backbone=half)

    model = nnx.eval_shape(make)
    graphdef, params = nnx.split(model)

    def features(params, images):
        return nnx.merge(graphdef, params).features(images)

    images = jax.ShapeDtypeStruct((2, 16, 16, 3), np.float32)
    assert jax.eval_shape(features, nnx.to_pure_dict(params), images).dtype == np.float32


def test_weights_are_drawn_from_the_seed():
    def kernel(seed):
        options = {"image_size": 16, "backbone": TINY, "seed": seed}
        return np.asarray(vit_jax.create_model("vit_ti16", **options).backbone.patch_embed.kernel)

    np.testing.assert_array_equal(kernel(0), kernel(0))
    assert not np.array_equal(kernel(0), kernel(1))


def test_head_and_images_are_the_callers_choice():
    def make(**options):
        return nnx.eval_shape(lambda: vit_jax.create_model("vit_s16", **options))

    assert make().head.fc.kernel.shape == (384, 1000)
    assert make(num_classes=7).head.fc.kernel.shape == (384, 7)
    assert make(num_classes=0).head is None
    backbone = make(image_size=(32, 48), backbone={"drop_path": 0.1, "scan": True}).backbone
    assert backbone.grid == (2, 3) and backbone.drop_path == 0.1 and backbone.scan


def test_models_are_listed_by_pattern():
    assert vit_jax.list_models("dinov2_*_reg") == [f"dinov2_{size}14_reg" for size in "sblg"]
    assert vit_jax.list_models("resnet*") == []


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("vit_b61", {}, r"model 'vit_b61' is unknown \(did you mean 'vit_b16'\?\); vit_jax.list"),
        ("ViT-B/16", {}, "model 'ViT-B/16' is unknown.*list_models"),
        ("vit_s16", {"num_classes": -1}, "num_classes=-1 must not be negative; 0 makes no head"),
        ("vit_s16", {"image_size": 100}, "image_size=.* try"),
    ],
)
def test_what_does_not_work_out_is_refused(name, options, words):
    with pytest.raises(ValueError, match=words) as caught:
        vit_jax.create_model(name, **options)
    assert "\n" not in str(caught.value)


def test_a_misspelt_part_is_named():
    with pytest.raises(TypeError, match="drop_paths"):
        vit_jax.create_model("vit_s16", backbone={"drop_paths": 0.1})
