"""Training: the state and one step of it. Read this file first.

`train_step` is pure and knows no method: an objective (vit_jax/objectives) gives the loss. The
loop that calls it is in `vit_jax/trainer.py`.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict

from vit_jax import config as config_lib
from vit_jax.axes import gathered, named, splitting
from vit_jax.data.sources import DatasetInfo
from vit_jax.functional import Functional
from vit_jax.models.model import Model
from vit_jax.models.vit import make_vit
from vit_jax.objectives import OBJECTIVES, Objective
from vit_jax.optim import make_optimizer, names_filter, num_updates, trained_names, update_ema
from vit_jax.preprocess import Preprocess, make_preprocess
from vit_jax.sharding import (
    BATCH_AXES,
    Splitting,
    check_batch_size,
    config_sizes,
    num_batch_parts,
    num_slices,
    on_host,
    place_tree,
    replicated,
    sum_by_slices,
)
from vit_jax.tree import all_finite, map_named, num_params

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]
Axis = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """The config's `train` section.

    Attributes:
      keep: how many of the newest checkpoints stay.
      keep_best: how many of the best by `best_metric` stay beside them.
      best_metric: like 'test/top1', higher is better; '' for none.
      ema_decay: of the parameters' moving average, which evaluation then uses; 0.0 for none.
      max_skips: how many updates that are not finite are skipped before the run stops.
      trainable: regex that the whole name of a parameter must match to be trained, such as
        'objective/head/.*' (blocks by number: 'backbone/blocks/11/.*'); '' for all. The others
        keep every bit: they have no gradient, optimiser state, weight decay or average.
      wandb: project at Weights & Biases; '' for none.
      spmd: 'jit' with shardings, or 'pmap': the step replicated by `jax.pmap` with explicit sums,
        on a mesh that has but `data`.
      accumulate: into how many parts a step splits the batch, one after another, which saves
        memory and changes no number.
      offload_opt_state: whether the optimiser's state waits in the host's memory between updates.
    """

    keep: int = 2
    keep_best: int = 1
    best_metric: str = ""
    ema_decay: float = 0.0
    max_skips: int = 0
    trainable: str = ""
    wandb: str = ""
    spmd: str = "jit"
    accumulate: int = 1
    offload_opt_state: bool = False

    def __post_init__(self):
        if self.spmd not in ("jit", "pmap"):
            raise ValueError(f"spmd={self.spmd!r} is unknown; choose 'jit' or 'pmap'.")
        if self.accumulate < 1:
            raise ValueError(f"accumulate={self.accumulate} must be at least 1, for no splitting.")
        if self.spmd == "pmap" and self.offload_opt_state:
            raise ValueError("offload_opt_state=True needs spmd='jit'.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay} must be in [0, 1).")
        if self.max_skips < 0:
            raise ValueError(f"max_skips={self.max_skips} must not be negative.")
        try:
            re.compile(self.trainable)
        except re.error as error:
            raise ValueError(f"trainable={self.trainable!r} is no regex: {error}.") from error


class TrainState(NamedTuple):
    """All that a step changes.

    Attributes:
      step: int32 scalar, updates tried so far.
      params: {'backbone': …, 'objective': …}, what gets gradients.
      non_trainable: the same for every other variable, frozen parameters among them.
      opt_state: of optax.
      ema: an exponential moving average of the parameters, or ().
    """

    step: jax.Array
    params: Any
    non_trainable: Any
    opt_state: Any
    ema: Any


@dataclasses.dataclass(frozen=True)
class _ModelOf:
    """What `Functional` builds the model of a train state by; equal for equal structures."""

    backbone: nnx.GraphDef
    objective: nnx.GraphDef

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        # Not of the objective's, which may hold a dict: that can be compared, not hashed.
        return hash(self.backbone)

    def __call__(self, variables: tuple[Any, Any]) -> Model:
        backbone, objective = _merge(vars(self), *variables)
        return objective.model(backbone)


def _merge(graphdefs: Mapping[str, Any], params: Any, rest: Any) -> tuple[Any, Objective]:
    names = ("backbone", "objective")
    return tuple(nnx.merge(graphdefs[name], params[name], rest[name]) for name in names)


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a step needs and does not change: structure without arrays."""

    graphdefs: dict[str, Any]
    trainable: dict[str, Any]
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    seed: int
    options: TrainOptions
    preprocess: Preprocess
    flops_per_image: int
    image_size: tuple[int, int]
    num_params: int
    couples_examples: bool = False

    def merge(self, params: Any, non_trainable: Any) -> tuple[Any, Objective]:
        """The backbone and the objective as modules."""
        return _merge(self.graphdefs, params, non_trainable)

    def split(self, backbone: nnx.Module, objective: Objective) -> tuple[Any, Any]:
        """Modules -> (params, non_trainable), plain nested dicts of arrays."""
        params, non_trainable = {}, {}
        for name, module in (("backbone", backbone), ("objective", objective)):
            _, trained, rest = nnx.split(module, self.trainable[name], ...)
            params[name], non_trainable[name] = map(nnx.to_pure_dict, (trained, rest))
        return params, non_trainable

    def start(self, backbone: nnx.Module, objective: Objective) -> TrainState:
        """The state before the first step."""
        params, non_trainable = self.split(backbone, objective)
        ema = jax.tree.map(jnp.copy, params) if self.options.ema_decay else ()
        opt_state = self.optimizer.init(params)
        return TrainState(jnp.int32(0), params, non_trainable, opt_state, ema)

    def model(self, state: TrainState) -> Functional:
        """What evaluation and export see: of the averaged parameters where there are any."""
        return Functional(self._model_of, (state.ema or state.params, state.non_trainable))

    @staticmethod
    def not_of_model(state: TrainState) -> tuple[str, ...]:
        """The parts of a state, or of its shapes, that `model` does not read."""
        return ("opt_state", "params") if state.ema else ("opt_state",)

    @functools.cached_property
    def _model_of(self) -> _ModelOf:
        return _ModelOf(**self.graphdefs)


def train_step(
    parts: Parts, state: TrainState, batch: Batch, *, axis: Axis = None
) -> tuple[TrainState, Metrics]:
    """One update of everything; where loss or gradients are not finite, of the step counter alone.

    Args:
      parts: see `Parts`.
      state: donated.
      batch: the global batch, see `Objective`; under `jax.pmap` a device's part of it.
      axis: the name of pmap's axis; or those of a mesh, where each device has its own part.

    Returns:
      The new state, and scalar metrics of this step, 'finite' among them.
    """
    keys = example_keys(parts.seed, state.step, len(batch["mask"]), axis)
    whole = axis is None and parts.options.accumulate == 1
    valid = jnp.maximum(sum_over(batch["mask"].sum(), axis), 1)

    def loss_fn(params, batch, keys):
        backbone, objective = parts.merge(_gathered(params), state.non_trainable)
        loss, output = objective(backbone, batch, step=state.step, key=keys, train=True)
        if whole:
            return loss, output
        share = batch["mask"].sum() / valid  # means of parts add up by their valid examples
        return loss * share, output._replace(aux=jax.tree.map(lambda x: x * share, output.aux))

    def compute(batch, keys):
        return jax.value_and_grad(loss_fn, has_aux=True)(state.params, batch, keys)

    num_parts, together = parts.options.accumulate, parts.preprocess.together
    results = accumulate(compute, (batch, keys), num_parts=num_parts, together=together)
    (loss, output), grads = sum_over(results, axis)
    updates, opt_state = parts.optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    backbone, objective = parts.merge(params, state.non_trainable)
    objective.after_update(backbone, output.aux, state.step)
    _, non_trainable = parts.split(backbone, objective)
    ema = update_ema(state.ema, params, parts.options.ema_decay) if state.ema else state.ema

    grad_norm = optax.tree.norm(grads)
    new = TrainState(state.step, params, non_trainable, opt_state, ema)
    # What decides must be known before the pass over all parameters and states that updates them:
    # asking the updates or the states as well would be a pass of its own. Finite gradients make
    # finite states; an update that is not finite all the same is told, and its state never saved.
    healthy = all_finite((loss, grad_norm, non_trainable))
    new = jax.tree.map(lambda new, old: jnp.where(healthy, new, old), new, state)
    # Of what the parameters changed by, not of `updates`, which XLA would write to memory for it.
    update_norm = optax.tree.norm(jax.tree.map(jnp.subtract, new.params, state.params))
    norms = {"grad_norm": grad_norm, "update_norm": update_norm}
    finite = healthy & jnp.isfinite(update_norm)
    metrics = {
        name: total / jnp.maximum(count, 1) for name, (total, count) in output.metrics.items()
    }
    learning_rate = parts.schedule(num_updates(state.opt_state))
    rejected = sum_over((~batch["mask"]).sum(), axis)  # in training there is no other padding
    metrics |= norms | {"learning_rate": learning_rate, "finite": finite, "rejected": rejected}
    return new._replace(step=state.step + 1), {"loss": loss} | metrics


def _gathered(params: Any) -> Any:
    """The parameters as products want them; blocks gather their own, one after another."""
    blocks = re.compile(r"\bblocks/")
    return map_named(lambda name, x: x if blocks.search(name) else gathered(x, name), params)


def accumulate(function: Callable, arguments: Any, *, num_parts: int, together: int) -> Any:
    """function(*arguments), summed over parts of their leading axis, one after another.

    Slots are dealt out in turn, so that each device splits its own share of the batch.

    Args:
      function: of trees of arrays, answers a tree of arrays that add.
      arguments: their leading axis is a multiple of num_parts · together.
      num_parts: 1 calls the function as it is.
      together: so many neighbours stay together.
    """
    if num_parts == 1:
        return function(*arguments)

    def deal(x):
        x = x.reshape(-1, num_parts, together, *x.shape[1:]).swapaxes(0, 1)
        return x.reshape(num_parts, -1, *x.shape[3:])  # [parts, batch / parts, …]

    def add(total, part):
        part = jax.tree.map(lambda x: named(x, "batch"), part)
        return jax.tree.map(jnp.add, total, function(*part)), None

    parts = jax.tree.map(deal, arguments)
    shapes = jax.eval_shape(function, *jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(add, zeros, parts)[0]


def sum_over(tree: Any, axis: Axis) -> Any:
    """The sum over all devices; without an axis arrays are global, and sums complete."""
    if axis is None:
        return tree
    return sum_by_slices(tree) if axis == BATCH_AXES else jax.lax.psum(tree, axis)


def sums_by_slices(parts: Parts, mesh: jax.sharding.Mesh) -> bool:
    """Whether each device computes gradients of its own part, for `sum_by_slices`.

    It wants several slices, the same parameters everywhere, and a loss that can be split.
    """
    same = num_batch_parts(mesh) == mesh.size and config_sizes(mesh)["fsdp"] == 1
    plain = not parts.couples_examples and not parts.options.offload_opt_state
    return num_slices(mesh) > 1 and same and plain and parts.options.spmd == "jit"


def make_step(parts: Parts, state: TrainState, mesh: jax.sharding.Mesh) -> Callable:
    """`train_step` for a mesh: donates the state, and leaves each array where `state` has it.

    Args:
      parts: see `Parts`.
      state: arrays, or what `abstract_state` answers.
      mesh: that they lie on.

    Returns:
      What `jax.jit` or `jax.pmap` do; pmap wants its batch as `put_parts` gives it.
    """
    if parts.options.spmd == "pmap":
        step = functools.partial(train_step, parts, axis="batch")
        options = {"in_axes": (None, 0), "out_axes": (None, None), "donate_argnums": 0}
        devices = mesh.devices.ravel().tolist()
        return jax.pmap(step, "batch", devices=devices, axis_size=mesh.size, **options)

    places = jax.tree.map(lambda x: x.sharding, state)
    if sums_by_slices(parts, mesh):
        whole = PartitionSpec()
        specs = {"in_specs": (whole, PartitionSpec(BATCH_AXES)), "out_specs": (whole, whole)}
        step = functools.partial(train_step, parts, axis=BATCH_AXES)
        step = jax.shard_map(step, mesh=mesh, check_vma=False, **specs)
        step.__name__ = "train_step"
        return jax.jit(step, donate_argnums=0, out_shardings=(places, replicated(mesh)))
    offloaded = parts.options.offload_opt_state

    def step(state, batch):
        if offloaded:
            near = jax.tree.map(lambda x: x.with_memory_kind("device"), places.opt_state)
            state = state._replace(opt_state=jax.device_put(state.opt_state, near))
        # Models name their axes; kernels, which the compiler cannot split, choose by the mesh.
        with splitting(Splitting(mesh)), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return train_step(parts, state, batch)

    step.__name__ = "train_step"  # what profiles and the compilation cache show
    return jax.jit(step, donate_argnums=0, out_shardings=(places, replicated(mesh)))


def check_batch(batch_size: int, parts: Parts, mesh: jax.sharding.Mesh) -> None:
    """Raises ValueError unless devices, accumulation and mixup can split the global batch."""
    options, together = parts.options, parts.preprocess.together
    if options.spmd == "pmap" and mesh.size != mesh.shape["data"]:
        raise ValueError(
            "train.spmd='pmap' splits the batch alone: use mesh.data=-1 and 1 for the other axes, "
            "or spmd='jit'."
        )
    split = options.spmd == "pmap" or options.accumulate > 1 or sums_by_slices(parts, mesh)
    fit = {"accumulate": options.accumulate, "together": together if split else 1}
    check_batch_size(batch_size, mesh, **fit)
    if batch_size % together:
        raise ValueError(f"mixup pairs examples: batch_size={batch_size} must be even.")


def example_keys(seed: int, step: jax.Array, batch_size: int, axis: Axis = None) -> jax.Array:
    """[batch] keys, one a slot of the global batch: no mesh and no restart changes a draw."""
    step_key = jax.random.fold_in(jax.random.key(seed), step)
    first = 0 if axis is None else jax.lax.axis_index(axis) * batch_size
    return jax.vmap(jax.random.fold_in, (None, 0))(step_key, first + jnp.arange(batch_size))


def make_parts(config: ConfigDict, info: DatasetInfo) -> tuple[Parts, Callable[[], TrainState]]:
    """The static parts of a run, and a function that makes its initial `TrainState`."""
    measured = {"dataset_mean": info.mean, "dataset_std": info.std}
    preprocess = config_lib.call("preprocess", make_preprocess, config.preprocess, **measured)
    objective_class, options = config_lib.choose("objective", OBJECTIVES, config.objective)
    training = config_lib.call("train", TrainOptions, config.train)

    def make_modules():
        rngs = nnx.Rngs(config.seed)
        backbone = config_lib.call("model", make_vit, config.model, rngs=rngs)
        derived = {
            "backbone": backbone,
            "num_classes": len(info.class_names),
            "preprocess": preprocess,
            "rngs": rngs,
        }
        return backbone, config_lib.call("objective", objective_class, options, **derived)

    backbone, objective = nnx.eval_shape(make_modules)
    check_separable(objective, training)
    graphdefs = {"backbone": nnx.graphdef(backbone), "objective": nnx.graphdef(objective)}
    derived = {"total_steps": config.total_steps, "depth": backbone.depth}
    optimizer, schedule = config_lib.call("optimizer", make_optimizer, config.optimizer, **derived)
    trainable = {"backbone": nnx.Param, "objective": objective.trainable}
    params = {
        name: nnx.to_pure_dict(nnx.state(module, trainable[name]))
        for name, module in (("backbone", backbone), ("objective", objective))
    }
    trained = trained_names(params, training.trainable)
    parts = Parts(
        graphdefs=graphdefs,
        trainable={name: names_filter(name, trained) for name in trainable},
        optimizer=optimizer,
        schedule=schedule,
        seed=config.seed,
        options=training,
        preprocess=preprocess,
        flops_per_image=objective.flops_per_image(backbone),
        image_size=backbone.image_size,
        num_params=num_params(params),
        couples_examples=objective.couples_examples,
    )
    return parts, lambda: parts.start(*make_modules())


def check_separable(objective: Objective, options: TrainOptions) -> None:
    """Raises ValueError if the batch is to be split for a loss that couples its examples."""
    if objective.couples_examples and (options.spmd == "pmap" or options.accumulate > 1):
        raise ValueError(
            f"train.spmd={options.spmd!r} with train.accumulate={options.accumulate} splits the "
            f"batch, but the loss of {type(objective).__name__} compares all its examples with "
            "each other; use spmd='jit' and accumulate=1."
        )


def abstract_state(
    init: Callable[[], TrainState], mesh: jax.sharding.Mesh, *, offload: bool = False
) -> TrainState:
    """Shapes, types and places of a state's arrays, see `sharding.place`.

    Args:
      init: makes the state.
      mesh: to place it on.
      offload: whether the optimiser's state lies in the host's memory.
    """
    state = place_tree(jax.eval_shape(init), mesh)
    return state._replace(opt_state=on_host(state.opt_state)) if offload else state
