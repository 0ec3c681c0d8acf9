"""The Vision Transformer (Dosovitskiy et al. 2021, arXiv:2010.11929)."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from vit_jax.axes import gathered, named
from vit_jax.kernels.attention import IMPLEMENTATIONS, Segments
from vit_jax.models.layers import (
    ACTIVATIONS,
    NORM_EPS,
    NORMS,
    Block,
    ParallelBlock,
    PatchEmbed,
    draw_kept,
    drop,
    fold_in,
    make_norm,
    take,
)
from vit_jax.models.pos_embed import Rope, rope2d, sincos2d

# dim, depth, num_heads, mlp_dim. Ti: Touvron et al. 2021 (DeiT); S, B, L, H: Steiner et al. 2022,
# Dosovitskiy et al. 2021; M: DeiT-III's code, between S and B; So400m: Alabdulmohsin et al. 2023;
# g, G: Zhai et al. 2022, table 2; e: Chen et al. 2022 (PaLI), table 1; 7B: Siméoni et al. 2025
# (DINOv3); 22B: Dehghani et al. 2023, table 1.
VARIANTS = {
    "Ti": (192, 12, 3, 768),
    "S": (384, 12, 6, 1536),
    "M": (512, 12, 8, 2048),
    "B": (768, 12, 12, 3072),
    "L": (1024, 24, 16, 4096),
    "So400m": (1152, 27, 16, 4304),
    "H": (1280, 32, 16, 5120),
    "g": (1408, 40, 16, 6144),
    "G": (1664, 48, 16, 8192),
    "e": (1792, 56, 16, 15360),
    "7B": (4096, 40, 32, 8192),
    "22B": (6144, 48, 48, 24576),
}


def _all_but_gathered(primitive, *_, **__) -> bool:
    return primitive.name != "sharding_constraint"  # what makes parameters whole


REMAT_POLICIES = {
    "none": _all_but_gathered,  # keep all activations; a scan's parameters are gathered again
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # keep the linear layers'
    "full": jax.checkpoint_policies.nothing_saveable,  # keep each block's input only
    # keep what 'dots' does, in the memory of the devices' hosts
    "offload": jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
}


class VisionTransformer(nnx.Module):
    """Patches in, tokens out. Pooling, heads and losses are the objective's.

    Tokens stand in the order class, distillation, registers, patches. Registers have no position
    (Darcet et al. 2024, section 3.2): they go in once the others' positions were added.

    Args:
      image_size: height and width in pixels, multiples of the patch's.
      patch_size: height and width in pixels.
      dim, depth, num_heads, mlp_dim: the encoder's shape; of 'swiglu', `mlp_dim` is the width
        after the gate.
      cls_token, dist_token: whether a class token and behind it DeiT's distillation token (Touvron
        et al. 2021, section 4) go in front of the patches.
      num_reg_tokens: register tokens.
      pos_embed: 'learned' (one vector a token, class and distillation tokens' too), 'sincos2d'
        (fixed), 'rope2d' (fixed turns of queries and keys, patches only) or 'none'.
      mlp: 'mlp' or 'swiglu'.
      activation: of the MLP, 'gelu_tanh' or 'gelu' (exact, as torch's); 'swiglu' has its own.
      norm, norm_eps: 'layernorm' or 'rmsnorm', and its epsilon.
      qk_norm: whether each head's queries and keys are normalised.
      qkv_bias: whether their projection has a bias.
      parallel: whether attention and MLP stand side by side after one norm.
      final_norm: whether a norm follows the blocks; one behind the pooling may take its place.
      dropout: rate after the position embedding, in the MLPs and after each branch.
      drop_path: rate of the last block's branches; it rises linearly from 0 at the first.
      patch_dropout: share of the patches that each training pass leaves out (Li et al. 2023, FLIP,
        section 3); at least one stays.
      layer_scale: initial value of LayerScale, 0.0 for none.
      scan: run the blocks as one `jax.lax.scan` over stacked parameters (compiles faster).
      remat: what the backward pass keeps, one of REMAT_POLICIES.
      attention: how it is computed, one of `kernels.attention.IMPLEMENTATIONS`.
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
        dist_token: bool = False,
        num_reg_tokens: int = 0,
        pos_embed: str = "learned",
        mlp: str = "mlp",
        activation: str = "gelu_tanh",
        norm: str = "layernorm",
        norm_eps: float = NORM_EPS,
        qk_norm: bool = False,
        qkv_bias: bool = True,
        parallel: bool = False,
        final_norm: bool = True,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        patch_dropout: float = 0.0,
        layer_scale: float = 0.0,
        scan: bool = False,
        remat: str = "none",
        attention: str = "auto",
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.image_size, self.patch_size = tuple(image_size), tuple(patch_size)
        self.grid = _grid(self.image_size, self.patch_size)
        _check_rates(dropout=dropout, drop_path=drop_path, patch_dropout=patch_dropout)
        _check_choices(pos_embed=pos_embed, mlp=mlp, activation=activation, norm=norm, remat=remat)
        _check_choices(attention=attention)
        _check_choices(dtype=dtype if isinstance(dtype, str) else str(jnp.dtype(dtype)))
        _check_tokens(cls_token, dist_token, num_reg_tokens)
        _check_heads(dim, num_heads, pos_embed)
        self.dim, self.depth, self.num_heads, self.mlp_dim = dim, depth, num_heads, mlp_dim
        self.pos_kind, self.mlp_kind, self.activation = pos_embed, mlp, activation
        self.norm_kind, self.norm_eps = norm, norm_eps
        self.dropout, self.drop_path, self.patch_dropout = dropout, drop_path, patch_dropout
        self.scan, self.remat, self.dtype = scan, remat, jnp.dtype(dtype)

        patches = self.grid[0] * self.grid[1]
        self.num_prefix_tokens = cls_token + dist_token + num_reg_tokens
        self.num_tokens = self.num_prefix_tokens + patches
        self.patch_embed = PatchEmbed(self.patch_size, dim, dtype=self.dtype, rngs=rngs)
        self.cls_token = nnx.Param(jnp.zeros((1, dim))) if cls_token else None
        table = _noise(rngs, cls_token + dist_token + patches, dim)
        self.pos_embed = nnx.Param(table) if pos_embed == "learned" else None
        # Not zero: tokens that are alike at the start would stay alike.
        self.dist_token = nnx.Param(_noise(rngs, 1, dim)) if dist_token else None
        registers = num_reg_tokens, dim
        self.reg_tokens = nnx.Param(_noise(rngs, *registers)) if num_reg_tokens else None
        options = {
            **{"mlp": mlp, "activation": activation, "norm": norm, "norm_eps": norm_eps},
            **{"qk_norm": qk_norm, "qkv_bias": qkv_bias, "dropout": dropout},
            **{"layer_scale": layer_scale, "attention": attention, "dtype": self.dtype},
        }
        make_block = ParallelBlock if parallel else Block
        keys = jax.random.split(rngs.params(), depth)

        def make(key):
            return make_block(dim, num_heads, mlp_dim, **options, rngs=nnx.Rngs(key))

        layers = _draw(make, keys)
        if scan:  # one block whose parameters have a leading axis: the layer
            layers = [jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)]
        graphdef = nnx.graphdef(nnx.eval_shape(make, keys[0]))
        blocks = [nnx.merge(graphdef, layer) for layer in layers]
        self.blocks = blocks[0] if scan else nnx.List(blocks)
        self.norm = make_norm(dim, norm=norm, eps=norm_eps, rngs=rngs) if final_norm else None

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
        """Adds positions, puts the prefix tokens in front, runs the blocks and the final norm.

        Args:
          tokens: [batch, patches, dim] from `embed`, or some of them.
          positions: [batch, patches] int32, each token's place in the grid, row by row; None
            says that all are there, in order.
          mask: [batch, patches] bool, False for patches that nobody may attend to.
          segment_ids: [batch, patches] int32: tokens attend within their segment (several images
            packed into one sequence; needs a model without prefix tokens).
          key: [batch] random keys, one an example, or None for the deterministic forward pass.
          layers: blocks, counted from 0, or from the end with -1, whose outputs are wanted too.

        Returns:
          [batch, tokens, dim] after the final norm; with `layers`, also a list of those blocks'
          outputs before it. With `key` and `patch_dropout`, fewer tokens.
        """
        _check_layers(layers, self.depth)
        if self.patch_dropout and key is not None:
            count = self._num_kept(tokens.shape[1])
            kept = draw_kept(fold_in(key, self.depth + 1), count, tokens.shape[1])
            positions = kept if positions is None else take(positions, kept)
            tokens, mask, segment_ids = (take(x, kept) for x in (tokens, mask, segment_ids))
        x = self._add_positions(tokens.astype(self.dtype), positions)  # [batch, tokens, dim]
        if self.dropout:
            x = drop(x, self.dropout, fold_in(key, self.depth))
        mask, rope = self._attention_mask(mask, segment_ids), self._rope(positions)
        x = named(x, "batch", None, "dim")
        x, outputs = self._run_blocks(x, mask, rope, key, layers)
        if self.norm is not None:
            x = self.norm(x).astype(self.dtype)
        return (x, outputs) if layers else x

    def features(
        self, images: jax.Array, *, layers: Sequence[int], final_norm: bool = True
    ) -> list[jax.Array]:
        """Maps of the patch tokens after some blocks, for dense tasks; deterministic.

        The prefix tokens are left out; `encode(embed(images), layers=layers)` answers them too.

        Args:
          images: normalised [batch, height, width, channels].
          layers: blocks, counted from 0, or from the end with -1.
          final_norm: whether the final norm goes over each map, where the model has one.

        Returns:
          For each of `layers`, in their order: [batch, rows, columns, dim].
        """
        if not layers:
            raise ValueError("layers=() names no block; use layers=(-1,) for the last one's map.")
        _, outputs = self.encode(self.embed(images), layers=layers)
        maps = [output[:, self.num_prefix_tokens :] for output in outputs]
        if final_norm and self.norm is not None:
            maps = [self.norm(x).astype(self.dtype) for x in maps]
        return [x.reshape(x.shape[0], *self.grid, self.dim) for x in maps]

    def attention(self, images: jax.Array) -> jax.Array:
        """Who attends to whom in each block, for figures; deterministic.

        Args:
          images: normalised [batch, height, width, channels].

        Returns:
          [depth, batch, heads, queries, keys] float32, prefix tokens first.
        """
        x = self._add_positions(self.embed(images).astype(self.dtype), None)
        rope, weights = self._rope(None), []
        for index in range(self.depth):
            block = self.blocks if self.scan else self.blocks[index]
            if self.scan:
                graphdef, state = nnx.split(block)
                layer = jax.tree.map(lambda p: p[index], nnx.to_pure_dict(state))  # noqa: B023
                block = nnx.merge(graphdef, layer)
            weights.append(block.attn.weights(block.norm1(x).astype(x.dtype), rope))
            x = block(x, rope=rope)
        return jnp.stack(weights)

    @property
    def num_train_tokens(self) -> int:
        """Tokens of an image in training: `num_tokens` less those of patch dropout."""
        return self.num_prefix_tokens + self._num_kept(self.grid[0] * self.grid[1])

    def flops(self, num_tokens: int | None = None) -> int:
        """Matrix-product FLOPs of the forward pass on one image, two a multiply-add.

        `2·p·v·d + depth·(8·n·d² + 4·n²·d + 2·k·n·d·m)` with p patches of v values, n tokens, width
        d, MLP width m and its k matrices: 2, of SwiGLU 3. Norms, softmax, turning by RoPE and other
        element-wise work count nothing.

        Args:
          num_tokens: how many are encoded, prefix tokens too; all by default.
        """
        n = self.num_tokens if num_tokens is None else num_tokens
        d, patches = self.dim, self.grid[0] * self.grid[1]
        matrices = 3 if self.mlp_kind == "swiglu" else 2
        block = 8 * n * d * d + 4 * n * n * d + 2 * matrices * n * d * self.mlp_dim
        return 2 * patches * math.prod(self.patch_embed.kernel.shape) + self.depth * block

    def _num_kept(self, patches: int) -> int:
        return max(round(patches * (1 - self.patch_dropout)), 1)

    def _add_positions(self, x: jax.Array, positions: jax.Array | None) -> jax.Array:
        """[batch, patches, dim] -> [batch, tokens, dim], the prefix tokens in front."""
        named = [token for token in (self.cls_token, self.dist_token) if token is not None]
        front = [token[...].astype(self.dtype) for token in named]  # each [1, dim]
        table = self._table(len(front))
        if table is not None:
            rows = table[len(front) :]
            x = x + (rows if positions is None else rows[positions])
            front = [token + table[i] for i, token in enumerate(front)]
        if self.reg_tokens is not None:
            front.append(self.reg_tokens[...].astype(self.dtype))
        if not front:
            return x
        prefix = jnp.concatenate(front)
        return jnp.concatenate([jnp.broadcast_to(prefix, (x.shape[0], *prefix.shape)), x], axis=1)

    def _table(self, prefix: int) -> jax.Array | None:
        """What is added to `prefix` tokens and all patches, or None: [prefix + patches, dim]."""
        if self.pos_embed is not None:
            return self.pos_embed[...].astype(self.dtype)
        if self.pos_kind != "sincos2d":
            return None
        table = sincos2d(self.grid, self.dim)  # the class token has no place in the grid
        return jnp.pad(table, ((prefix, 0), (0, 0))).astype(self.dtype)

    def _rope(self, positions: jax.Array | None) -> Rope | None:
        if self.pos_kind != "rope2d":
            return None
        angles = rope2d(self.grid, self.dim // self.num_heads)  # [patches, head_dim / 2]
        if positions is not None:
            angles = angles[positions]
        # Prefix tokens have no place in the grid: an angle of 0 turns nothing.
        pad = [(0, 0)] * (angles.ndim - 2) + [(self.num_prefix_tokens, 0), (0, 0)]
        angles = jnp.pad(angles, pad)
        return jnp.cos(angles), jnp.sin(angles)

    def _attention_mask(self, mask, segment_ids) -> jax.Array | Segments | None:
        prefix = self.num_prefix_tokens
        if segment_ids is not None:
            if prefix:
                raise ValueError("segment_ids need a model without class or other prefix tokens.")
            return Segments(
                segment_ids, segment_ids if mask is None else jnp.where(mask, segment_ids, -1)
            )
        return mask if mask is None else jnp.pad(mask, ((0, 0), (prefix, 0)), constant_values=True)

    def _run_blocks(self, x, mask, rope, key, layers) -> tuple[jax.Array, list[jax.Array]]:
        block = self.blocks if self.scan else self.blocks[0]
        graphdef = nnx.graphdef(block)
        rates = [self.drop_path * i / max(self.depth - 1, 1) for i in range(self.depth)]

        def run(params, x, rate, index):  # one block as a function: what remat and scan want
            rate = rate if self.drop_path and key is not None else 0.0
            block = nnx.merge(graphdef, gathered(params, "blocks/0/", self.dtype))
            keys = fold_in(key, index)
            x = block(x, mask=mask, rope=rope, drop_path=rate, keys=keys)
            return named(x, "batch", None, "dim")

        if self.remat != "none" or self.scan:
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
    dist_token: bool = False,
    num_reg_tokens: int = 0,
    pos_embed: str = "learned",
    mlp: str = "mlp",
    activation: str = "gelu_tanh",
    norm: str = "layernorm",
    norm_eps: float = NORM_EPS,
    qk_norm: bool = False,
    qkv_bias: bool = True,
    parallel: bool = False,
    final_norm: bool = True,
    dropout: float = 0.0,
    drop_path: float = 0.0,
    patch_dropout: float = 0.0,
    layer_scale: float = 0.0,
    scan: bool = False,
    remat: str = "none",
    attention: str = "auto",
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
        dist_token=dist_token,
        num_reg_tokens=num_reg_tokens,
        pos_embed=pos_embed,
        mlp=mlp,
        activation=activation,
        norm=norm,
        norm_eps=norm_eps,
        qk_norm=qk_norm,
        qkv_bias=qkv_bias,
        parallel=parallel,
        final_norm=final_norm,
        dropout=dropout,
        drop_path=drop_path,
        patch_dropout=patch_dropout,
        layer_scale=layer_scale,
        scan=scan,
        remat=remat,
        attention=attention,
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


CHOICES = {
    "pos_embed": ("learned", "sincos2d", "rope2d", "none"),
    "mlp": ("mlp", "swiglu"),
    "activation": ACTIVATIONS,
    "norm": NORMS,
    "remat": REMAT_POLICIES,
    "attention": IMPLEMENTATIONS,
    "dtype": ("float32", "bfloat16", "float16"),
}


def _check_choices(**values: str) -> None:
    for key, value in values.items():
        if value not in CHOICES[key]:
            names = ", ".join(repr(name) for name in CHOICES[key])
            raise ValueError(f"{key}={value!r} is unknown; choose one of {names}.")


def _check_rates(**rates: float) -> None:
    for key, rate in rates.items():
        if not 0 <= rate < 1:
            raise ValueError(f"{key}={rate} must be in [0, 1).")


def _check_tokens(cls_token: bool, dist_token: bool, num_reg_tokens: int) -> None:
    if dist_token and not cls_token:
        raise ValueError("dist_token=True needs cls_token=True: it stands behind the class token.")
    if num_reg_tokens < 0:
        raise ValueError(f"num_reg_tokens={num_reg_tokens} must not be negative; 0 is none.")


def _check_heads(dim: int, num_heads: int, pos_embed: str) -> None:
    if dim % num_heads:
        raise ValueError(f"dim={dim} must be a multiple of num_heads={num_heads}.")
    if pos_embed == "rope2d" and dim // num_heads % 4:
        raise ValueError(
            f"pos_embed='rope2d' needs heads of a multiple of 4 channels, not dim={dim} / "
            f"num_heads={num_heads} = {dim // num_heads}; use another num_heads."
        )


def _check_layers(layers: Sequence[int], depth: int) -> None:
    if wrong := [layer for layer in layers if not -depth <= layer < depth]:
        raise ValueError(f"layers={tuple(wrong)} must be in [{-depth}, {depth}): {depth} blocks.")


def _noise(rngs: nnx.Rngs, rows: int, dim: int) -> jax.Array:
    return 0.02 * jax.random.normal(rngs.params(), (rows, dim))


def _draw(make: Callable[[jax.Array], Block], keys: jax.Array) -> list[dict]:
    """The parameters of a block for each key."""

    def draw(key):
        return nnx.to_pure_dict(nnx.state(make(key)))

    if isinstance(keys, jax.core.Tracer):  # traced but once: NNX takes the square of a trace's
        draw = jax.jit(draw)  # length, which is half a minute for 48 blocks
    return [draw(key) for key in keys]
