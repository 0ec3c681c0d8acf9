"""The Vision Transformer (Dosovitskiy et al. 2021, arXiv:2010.11929)."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from vit_jax.models.layers import Block, PatchEmbed, drop, fold_in, layer_norm
from vit_jax.models.pos_embed import sincos2d

# dim, depth, num_heads, mlp_dim. Ti: Touvron et al. 2021 (DeiT); S, B, L, H: Steiner et al. 2022,
# Dosovitskiy et al. 2021; g, G: Zhai et al. 2022, table 2.
VARIANTS = {
    "Ti": (192, 12, 3, 768),
    "S": (384, 12, 6, 1536),
    "B": (768, 12, 12, 3072),
    "L": (1024, 24, 16, 4096),
    "H": (1280, 32, 16, 5120),
    "g": (1408, 40, 16, 6144),
    "G": (1664, 48, 16, 8192),
}

REMAT_POLICIES = {
    "none": None,  # keep all activations
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # keep the linear layers'
    "full": jax.checkpoint_policies.nothing_saveable,  # keep each block's input only
}


class VisionTransformer(nnx.Module):
    """Patches in, tokens out. Pooling, heads and losses are the objective's.

    Args:
      image_size: height and width in pixels, multiples of the patch's.
      patch_size: height and width in pixels.
      dim, depth, num_heads, mlp_dim: the encoder's shape.
      cls_token: whether a class token goes in front of the patches.
      pos_embed: 'learned' (one vector a token, the class token's too) or 'sincos2d' (fixed).
      dropout: rate after the position embedding, in the MLPs and after each branch.
      drop_path: rate of the last block's branches; it rises linearly from 0 at the first.
      layer_scale: initial value of LayerScale, 0.0 for none.
      scan: run the blocks as one `jax.lax.scan` over stacked parameters (compiles faster).
      remat: what the backward pass keeps, one of REMAT_POLICIES.
      dtype: of the matrix products and the residual stream; parameters stay float32.
    """

    def __init__(
        self,
        *,
        image_size: tuple[int, int],
        patch_size: tuple[int, int],
        dim: int,
        depth: int,
        num_heads: int,
        mlp_dim: int,
        cls_token: bool = False,
        pos_embed: str = "learned",
        dropout: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float = 0.0,
        scan: bool = False,
        remat: str = "none",
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.image_size, self.patch_size = tuple(image_size), tuple(patch_size)
        self.grid = _grid(self.image_size, self.patch_size)
        rates = {"dropout": dropout, "drop_path": drop_path}
        dtype = str(jnp.dtype(dtype)) if not isinstance(dtype, str) else dtype
        _check_shape(dim, num_heads, remat, pos_embed, dtype, rates)
        self.dim, self.depth, self.num_heads, self.mlp_dim = dim, depth, num_heads, mlp_dim
        self.dropout, self.drop_path, self.scan, self.remat = dropout, drop_path, scan, remat
        self.dtype = jnp.dtype(dtype)
        self.num_prefix_tokens = int(cls_token)
        self.patch_embed = PatchEmbed(self.patch_size, dim, dtype=self.dtype, rngs=rngs)
        self.cls_token = nnx.Param(jnp.zeros((1, dim))) if cls_token else None
        self.num_tokens = self.num_prefix_tokens + self.grid[0] * self.grid[1]
        table = 0.02 * jax.random.normal(rngs.params(), (self.num_tokens, dim))
        self.pos_embed = nnx.Param(table) if pos_embed == "learned" else None
        options = {"dropout": dropout, "layer_scale": layer_scale, "dtype": self.dtype}
        keys = jax.random.split(rngs.params(), depth)
        blocks = [Block(dim, num_heads, mlp_dim, **options, rngs=nnx.Rngs(key)) for key in keys]
        self.blocks = _stack(blocks) if scan else nnx.List(blocks)
        self.norm = layer_norm(dim, rngs)

    def __call__(self, images: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """Normalised [batch, height, width, channels] -> [batch, tokens, dim]."""
        return self.encode(self.embed(images), key=key)

    def embed(self, images: jax.Array) -> jax.Array:
        """The patch embedding alone: [batch, height, width, channels] -> [batch, patches, dim]."""
        if images.shape[1:3] != self.image_size:
            raise ValueError(
                f"images of {images.shape[1:3]} pixels given to a model of "
                f"image_size={self.image_size}; resize them or make the model for them."
            )
        return self.patch_embed(images)

    def encode(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        key: jax.Array | None = None,
        layers: Sequence[int] = (),
    ) -> jax.Array | tuple[jax.Array, list[jax.Array]]:
        """Adds positions, puts the class token in front, runs the blocks and the final norm.

        Args:
          tokens: [batch, patches, dim] from `embed`, or some of them.
          positions: [batch, patches] int32, each token's place in the grid, row by row; None
            says that all are there, in order.
          mask: [batch, patches] bool, False for patches that nobody may attend to.
          segment_ids: [batch, patches] int32: tokens attend within their segment (several images
            packed into one sequence; needs a model without prefix tokens).
          key: [batch] random keys, one an example, or None for the deterministic forward pass.
          layers: blocks, counted from 0, whose outputs are wanted too.

        Returns:
          [batch, tokens, dim] after the final norm; with `layers`, also a list of those blocks'
          outputs before it.
        """
        x = self._add_positions(tokens.astype(self.dtype), positions)  # [batch, tokens, dim]
        if self.dropout:
            x = drop(x, self.dropout, fold_in(key, self.depth))
        x, outputs = self._run_blocks(x, self._attention_mask(mask, segment_ids), key, layers)
        x = self.norm(x).astype(self.dtype)
        return (x, outputs) if layers else x

    def flops(self) -> int:
        """Matrix-product FLOPs of the forward pass on one image, two a multiply-add.

        `2·p·v·d + depth·(8·n·d² + 4·n²·d + 4·n·d·m)` with p patches of v values, n tokens, width d
        and MLP width m. Norms, softmax and other element-wise work count nothing.
        """
        d, patches = self.dim, self.grid[0] * self.grid[1]
        n = self.num_tokens
        block = 8 * n * d * d + 4 * n * n * d + 4 * n * d * self.mlp_dim
        return 2 * patches * math.prod(self.patch_embed.kernel.shape) + self.depth * block

    def _add_positions(self, x: jax.Array, positions: jax.Array | None) -> jax.Array:
        prefix = self.num_prefix_tokens
        if self.pos_embed is not None:
            table = self.pos_embed[...]
        else:  # the class token has no place in the grid
            table = jnp.pad(sincos2d(self.grid, self.dim), ((prefix, 0), (0, 0)))
        table = table.astype(self.dtype)
        x = x + (table[prefix:] if positions is None else table[prefix:][positions])
        if self.cls_token is None:
            return x
        cls = self.cls_token[...].astype(self.dtype) + table[:prefix]
        return jnp.concatenate([jnp.broadcast_to(cls, (len(x), *cls.shape)), x], axis=1)

    def _attention_mask(self, mask, segment_ids) -> jax.Array | None:
        prefix = self.num_prefix_tokens
        if segment_ids is not None:
            if prefix:
                raise ValueError("segment_ids need a model without a class token.")
            same = segment_ids[:, :, None] == segment_ids[:, None, :]
            return same if mask is None else same & mask[:, None, :]
        return mask if mask is None else jnp.pad(mask, ((0, 0), (prefix, 0)), constant_values=True)

    def _run_blocks(self, x, mask, key, layers) -> tuple[jax.Array, list[jax.Array]]:
        block = self.blocks if self.scan else self.blocks[0]
        graphdef = nnx.graphdef(block)
        rates = [self.drop_path * i / max(self.depth - 1, 1) for i in range(self.depth)]

        def run(params, x, rate, index):  # one block as a function: what remat and scan want
            rate = rate if self.drop_path and key is not None else 0.0
            block = nnx.merge(graphdef, params)
            return block(x, mask=mask, drop_path=rate, keys=fold_in(key, index))

        if self.remat != "none":
            # prevent_cse is for code outside of scans: there XLA would undo the rematerialisation.
            policy = REMAT_POLICIES[self.remat]
            run = jax.checkpoint(run, policy=policy, prevent_cse=not self.scan)
        if not self.scan:
            outputs = []
            for index, block in enumerate(self.blocks):
                x = run(nnx.to_pure_dict(nnx.state(block)), x, rates[index], index)
                outputs.append(x)
            return x, [outputs[layer] for layer in layers]

        def body(x, xs):
            x = run(xs[0], x, xs[1], xs[2])
            return x, x if layers else None

        stacked = nnx.to_pure_dict(nnx.state(self.blocks))
        xs = stacked, jnp.asarray(rates), jnp.arange(self.depth)
        x, outputs = jax.lax.scan(body, x, xs)
        return x, [outputs[layer] for layer in layers]


def make_vit(
    *,
    variant: str,
    image_size: int | tuple[int, int] = 224,
    dim: int | None = None,
    depth: int | None = None,
    num_heads: int | None = None,
    mlp_dim: int | None = None,
    cls_token: bool = False,
    pos_embed: str = "learned",
    dropout: float = 0.0,
    drop_path: float = 0.0,
    layer_scale: float = 0.0,
    scan: bool = False,
    remat: str = "none",
    dtype: str = "float32",
    rngs: nnx.Rngs,
) -> VisionTransformer:
    """A `VisionTransformer` by name: 'B/16', or 'B/16x8' for patches 16 high and 8 wide.

    `dim`, `depth`, `num_heads` and `mlp_dim` replace the variant's own where they are given; the
    rest are `VisionTransformer`'s arguments.

    Raises:
      ValueError: an unknown variant, or a shape that does not work out.
    """
    name, patch_size = _parse_variant(variant)
    given = dim, depth, num_heads, mlp_dim
    shape = [
        row if value is None else value for value, row in zip(given, VARIANTS[name], strict=True)
    ]
    if isinstance(image_size, int):
        image_size = (image_size, image_size)
    return VisionTransformer(
        image_size=tuple(image_size),
        patch_size=patch_size,
        **dict(zip(("dim", "depth", "num_heads", "mlp_dim"), shape, strict=True)),
        cls_token=cls_token,
        pos_embed=pos_embed,
        dropout=dropout,
        drop_path=drop_path,
        layer_scale=layer_scale,
        scan=scan,
        remat=remat,
        dtype=dtype,
        rngs=rngs,
    )


def _parse_variant(variant: str) -> tuple[str, tuple[int, int]]:
    name, _, patch = variant.partition("/")
    if name not in VARIANTS:
        choices = ", ".join(VARIANTS)
        raise ValueError(f"variant={variant!r} is unknown; use NAME/PATCH with NAME in {choices}.")
    sizes = patch.split("x")
    if len(sizes) > 2 or not all(size.isdigit() and int(size) for size in sizes):
        raise ValueError(f"variant={variant!r} needs a patch size in pixels, like '{name}/16'.")
    return name, (int(sizes[0]), int(sizes[-1]))


def _grid(image_size: tuple[int, int], patch_size: tuple[int, int]) -> tuple[int, int]:
    if len(image_size) != 2 or not all(isinstance(pixels, int) for pixels in image_size):
        raise ValueError(f"image_size={image_size} must be height and width, like (224, 224).")
    sides = list(zip(image_size, patch_size, strict=True))
    if any(pixels % patch or pixels < patch for pixels, patch in sides):
        nearest = tuple(max(round(pixels / patch), 1) * patch for pixels, patch in sides)
        raise ValueError(
            f"image_size={image_size} must be a multiple of patch_size={patch_size}; try {nearest}."
        )
    return image_size[0] // patch_size[0], image_size[1] // patch_size[1]


def _check_shape(
    dim: int, num_heads: int, remat: str, pos_embed: str, dtype: str, rates: dict
) -> None:
    for key, rate in rates.items():
        if not 0 <= rate < 1:
            raise ValueError(f"{key}={rate} must be in [0, 1).")
    if dim % num_heads:
        raise ValueError(f"dim={dim} must be a multiple of num_heads={num_heads}.")
    for key, value, choices in (
        ("remat", remat, REMAT_POLICIES),
        ("pos_embed", pos_embed, ("learned", "sincos2d")),
        ("dtype", dtype, ("float32", "bfloat16", "float16")),
    ):
        if value not in choices:
            names = ", ".join(repr(name) for name in choices)
            raise ValueError(f"{key}={value!r} is unknown; choose one of {names}.")


def _stack(blocks: list[Block]) -> Block:
    """One block whose parameters have a leading axis: the layer."""
    graphdef = nnx.graphdef(blocks[0])
    states = [nnx.to_pure_dict(nnx.state(block)) for block in blocks]
    return nnx.merge(graphdef, jax.tree.map(lambda *leaves: jnp.stack(leaves), *states))
