"""google's `.npz`: names and numbers that Flax Linen modules make, beside ours."""

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import nnx, traverse_util

from tests.interop.models import assert_close, draw
from tests.interop.mutations import MUTATIONS
from vit_jax.interop import files, npz
from vit_jax.interop.load import read_source
from vit_jax.interop.spec import fill, make_model

pytestmark = pytest.mark.slow


class Mlp(linen.Module):
    """Named by its class and Linen's counting, as in both of google's codes."""

    hidden: int

    @linen.compact
    def __call__(self, x):
        dim = x.shape[-1]
        x = linen.gelu(linen.Dense(self.hidden)(x))
        return linen.Dense(dim)(x)


def named(module_class, name, **options):
    return module_class(**options, name=name)


class Reference(linen.Module):
    """The ViT of vision_transformer (`old`) or of big_vision, written from the papers."""

    old: bool
    pool: str
    positions: bool = True
    classes: int = 5
    dim: int = 24
    depth: int = 2
    heads: int = 3

    @linen.compact
    def __call__(self, images):
        x = linen.Conv(self.dim, (4, 4), strides=(4, 4), padding="VALID", name="embedding")(images)
        rows, columns = x.shape[1:3]
        x = x.reshape(len(x), -1, self.dim)
        zeros = linen.initializers.zeros
        if not self.old:
            if self.positions:
                x = x + self.param("pos_embedding", zeros, (1, rows * columns, self.dim))
            else:
                x = x + sincos(rows, columns, self.dim)
        if self.pool == "cls":
            cls = self.param("cls", zeros, (1, 1, self.dim))
            x = jnp.concatenate([jnp.tile(cls, (len(x), 1, 1)), x], axis=1)
        x = Encoder(self.old, self.depth, self.heads, name="Transformer")(x)
        if self.pool == "map":
            x = named(MapHead, "MAPHead_0", heads=self.heads)(x)
        else:
            x = x[:, 0] if self.pool == "cls" else x.mean(1)
        return linen.Dense(self.classes, name="head")(x)


class Positions(linen.Module):
    @linen.compact
    def __call__(self, x):
        return x + self.param("pos_embedding", linen.initializers.zeros, (1, *x.shape[1:]))


class Encoder(linen.Module):
    old: bool
    depth: int
    heads: int

    @linen.compact
    def __call__(self, x):
        if self.old:
            x = Positions(name="posembed_input")(x)
        for i in range(self.depth):
            x = EncoderBlock(self.old, self.heads, name=f"encoderblock_{i}")(x)
        return linen.LayerNorm(name="encoder_norm")(x)


class EncoderBlock(linen.Module):
    old: bool
    heads: int

    @linen.compact
    def __call__(self, x):
        numbers = (0, 1, 2, 3) if self.old else (0, 0, 1, 0)
        y = linen.LayerNorm(name=f"LayerNorm_{numbers[0]}")(x)
        name = f"MultiHeadDotProductAttention_{numbers[1]}"
        x = x + linen.MultiHeadDotProductAttention(num_heads=self.heads, name=name)(y, y)
        y = linen.LayerNorm(name=f"LayerNorm_{numbers[2]}")(x)
        return x + named(Mlp, f"MlpBlock_{numbers[3]}", hidden=48)(y)


class MapHead(linen.Module):
    heads: int

    @linen.compact
    def __call__(self, x):
        probe = self.param("probe", linen.initializers.zeros, (1, 1, x.shape[-1]))
        probe = jnp.tile(probe, (len(x), 1, 1))
        name = "MultiHeadDotProductAttention_0"
        x = linen.MultiHeadDotProductAttention(num_heads=self.heads, name=name)(probe, x)
        y = linen.LayerNorm(name="LayerNorm_0")(x)
        return (x + named(Mlp, "MlpBlock_0", hidden=48)(y))[:, 0]


def sincos(rows, columns, dim):
    from tests.models.reference import sincos2d

    return sincos2d(rows, columns, dim).astype(np.float32)


IMAGES = np.random.default_rng(1).standard_normal((2, 16, 16, 3)).astype(np.float32)


def reference(**options):
    """Its parameters, loud and by flat names, and its logits of IMAGES."""
    module, rng = Reference(**options), np.random.default_rng(0)
    shapes = jax.eval_shape(module.init, jax.random.key(0), IMAGES)["params"]
    flat = {
        name: draw(name, leaf.shape, rng)
        for name, leaf in traverse_util.flatten_dict(shapes, sep="/").items()
    }
    params = traverse_util.unflatten_dict(flat, sep="/")
    return flat, jax.jit(module.apply)({"params": params}, IMAGES)


def written(folder, flat, prefix=""):
    """Those parameters as a file, read again."""
    path = epath.Path(folder / "w.npz")
    files.write_npz(path, {f"{prefix}{name}": array for name, array in flat.items()})
    return read_source(path, image_size=(16, 16))  # which fixed positions do not tell


def logits(read):
    model = fill(make_model(read.spec), read.params)
    graphdef, state = nnx.split(model)
    return jax.jit(lambda state: nnx.merge(graphdef, state)(IMAGES))(state)


@pytest.mark.parametrize("old, pool", [(True, "cls"), (False, "map")])
def test_each_mistake_is_seen(old, pool, tmp_path):
    flat, wanted = reference(old=old, pool=pool)
    read = written(tmp_path, flat)
    for mutation, mutate in MUTATIONS.items():
        with pytest.raises(AssertionError, match="of the RMS"):
            assert_close(logits(mutate(read)), wanted, "logits")
            pytest.fail(mutation)


@pytest.mark.parametrize(
    "options",
    [
        {"old": True, "pool": "cls"},
        {"old": True, "pool": "gap"},
        {"old": False, "pool": "cls"},
        {"old": False, "pool": "gap"},
        {"old": False, "pool": "map"},
        {"old": False, "pool": "gap", "positions": False},
    ],
)
def test_names_and_numbers(options, tmp_path):
    flat, wanted = reference(**options)
    read = written(tmp_path, flat, prefix="" if options["old"] else "params/")
    assert read.spec.backbone["num_heads"] == 3  # an axis tells it
    assert not read.report.missing and not read.report.unexpected
    assert_close(logits(read), wanted, "logits")
    again = npz.export(read.params, read.spec)
    if options == {"old": False, "pool": "cls"}:  # a table without a row for the class token
        again["pos_embedding"] = again.pop("Transformer/posembed_input/pos_embedding")[:, 1:]
        assert {name.split("/")[0] for name in again} == {name.split("/")[0] for name in flat}
        return
    if read.spec.pool != "map" and not options["old"] and options.get("positions", True):
        return  # the same model is written in vision_transformer's names
    assert again.keys() == flat.keys()
    for name, array in again.items():
        np.testing.assert_array_equal(array, flat[name], err_msg=name)
