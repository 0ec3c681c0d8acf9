"""Checkpoints: the only file that knows Orbax.

On disk a state is a nested dict of arrays whose names do not depend on how it was run: blocks are
unstacked whether or not they were scanned, and optimiser states are dicts by field name. The meta
data hold a checksum of every array, taken where the array was computed: what a disk or a network
changes on the way is noticed when it is restored.
"""

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from flax import traverse_util
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, LatestN

from vit_jax.paths import absolute
from vit_jax.tree import STACKED, layer_names, named_leaves

FORMAT = 1  # of what is on disk; one that older versions cannot read gets the next number

# What reading damaged files raises.
DAMAGE = OSError, ValueError, RuntimeError, KeyError, AttributeError


class MismatchError(ValueError):
    """A checkpoint that is whole, but of another model or of a newer version."""


class _Best:
    """Preserves the `number` checkpoints with the highest score, and none without a score."""

    def __init__(self, number: int):
        self.number, self.scores = number, {}

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [c.step for c in checkpoints if c.step in self.scores]
        best = sorted(steps, key=lambda step: (self.scores[step], step))[::-1][: self.number]
        return [checkpoint.step in best for checkpoint in checkpoints]


class _Manager(ocp.CheckpointManager):
    """Orbax's, but it does not ask JAX whether the job is to stop.

    JAX has all processes stop one poll after the highest number that any of them polled with last,
    and `runtime.AgreedStop` counts its polls. Orbax polls with the step, in its thread, too: a
    SIGTERM during a save was agreed on for a poll that had long been.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


class Checkpoints:
    """The checkpoints of one run, written in the background and renamed when whole.

    Args:
      folder: `workdir/checkpoints`; made if missing unless read_only.
      keep: how many of the newest are kept, at least 1.
      keep_best: how many of the best by `score` are kept beside them.
      read_only: for reading a run's checkpoints, perhaps while it goes on.
    """

    def __init__(
        self,
        folder: epath.PathLike,
        *,
        keep: int = 2,
        keep_best: int = 0,
        read_only: bool = False,
    ):
        if keep < 1 or keep_best < 0:
            raise ValueError(f"keep={keep} must be at least 1, keep_best={keep_best} at least 0.")
        self.folder = epath.Path(folder)
        if read_only and not self.folder.exists():
            raise FileNotFoundError(f"no checkpoint in {self.folder}; train first.")
        self._best = _Best(keep_best)
        options = ocp.CheckpointManagerOptions(
            create=not read_only,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,  # what a killed save left behind
            preservation_policy=AnyPreservationPolicy([LatestN(keep), self._best]),
        )
        handlers = {"state": _state_handler(), "meta": ocp.JsonCheckpointHandler()}
        self._manager = _Manager(absolute(self.folder), options=options, item_handlers=handlers)

    def steps(self) -> list[int]:
        """The whole checkpoints on disk, oldest first."""
        self._manager.reload()
        return sorted(self._manager.all_steps())

    def score(self, step: int, value: float) -> None:
        """Tells how good the checkpoint of `step` is (higher is better), before it is saved."""
        self._best.scores[step] = value

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Copies the state to the host and returns; the rest happens in the background.

        Raises:
          OSError: this or the previous save could not be written; older checkpoints are whole.
        """
        leaves = unstack(named_leaves(state))
        tree = traverse_util.unflatten_dict(leaves, sep="/")
        meta = meta | {"format": FORMAT, "checksums": checksums(leaves)}
        arguments = {"state": ocp.args.PyTreeSave(tree), "meta": ocp.args.JsonSave(meta)}
        self._guard(lambda: self._manager.save(step, args=ocp.args.Composite(**arguments)))

    def wait(self) -> None:
        """Returns when all saves are on disk; raises OSError as `save` does."""
        self._guard(self._manager.wait_until_finished)

    def restore(
        self, step: int, abstract: Any, *, without: Collection[str] = ()
    ) -> tuple[Any, dict[str, Any]]:
        """The state and the meta data of `step`.

        Args:
          abstract: the wanted tree, its leaves `jax.ShapeDtypeStruct`s with shardings.
          without: names of its top level that are not read: those leaves stay as they are.

        Raises:
          ValueError: the checkpoint holds other names or shapes, or is of a newer version.
          OSError: it is damaged; the older ones are named.
        """
        wanted = named_leaves(abstract)
        names = traverse_util.unflatten_dict(unstack_abstract(wanted), sep="/")
        meta = self.meta(step)
        with self._reading(step):
            self._check_names(step, names)
            names = {name: tree for name, tree in names.items() if name not in without}
            how = ocp.checkpoint_utils.construct_restore_args(names)
            partial = {"partial_restore": bool(without)}
            state = ocp.args.PyTreeRestore(names, restore_args=how, **partial)
            restored = self._manager.restore(step, args=ocp.args.Composite(state=state))
            leaves = _flat(restored.state)
            for name, value in checksums(leaves).items():
                if value != meta["checksums"].get(name):
                    raise OSError(f"{name} is not what was saved")
        read = {name: x for name, x in wanted.items() if name.split("/")[0] not in without}
        arrays = wanted | stack(leaves, read)
        return jax.tree.unflatten(jax.tree.structure(abstract), arrays.values()), meta

    def meta(self, step: int) -> dict[str, Any]:
        """The meta data of `step` alone; raises as `restore` does."""
        arguments = ocp.args.Composite(meta=ocp.args.JsonRestore())
        with self._reading(step):
            meta = self._manager.restore(step, args=arguments).meta
            if type(meta) is not dict or type(meta.get("format", FORMAT)) is not int:
                raise OSError("its meta data is damaged")
            if meta.get("format", FORMAT) > FORMAT:
                raise MismatchError(
                    f"checkpoint {self.folder / str(step)} was written by a newer vit_jax (format "
                    f"{meta['format']}, this one reads up to {FORMAT}); upgrade: "
                    "pip install -U vit-jax."
                )
            if "checksums" not in meta:
                raise OSError("its meta data holds no checksums")
        return meta

    def close(self) -> None:
        """Waits and frees the threads; raises OSError as `save` does."""
        self._guard(self._manager.close)

    def _check_names(self, step: int, wanted: dict) -> None:
        metadata = self._manager.item_metadata(step)["state"]
        saved = {k: tuple(v.shape) for k, v in _flat(metadata.tree).items()}
        wanted = {k: tuple(v.shape) for k, v in _flat(wanted).items()}
        for name in sorted(saved.keys() | wanted.keys()):
            if saved.get(name) != wanted.get(name):
                raise MismatchError(
                    f"checkpoint {self.folder / str(step)} holds {name} as {saved.get(name)}, the "
                    f"config makes it {wanted.get(name)}; use the config that it was trained with."
                )

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """What storage, TensorStore or JSON say of damaged files becomes an OSError in one line."""
        try:
            yield
        except Exception as caught:
            # Orbax wraps what comes of reading an array into a plain Exception.
            error = caught.__cause__ or caught if type(caught) is Exception else caught
            if isinstance(error, MismatchError) or "out of memory" in str(error).lower():
                raise
            if type(error) is not Exception and not isinstance(error, DAMAGE):
                raise
            older = [other for other in self._whole_steps() if other < step]
            raise OSError(
                f"checkpoint {self.folder / str(step)} is damaged ({_reason(error)}); "
                + (
                    f"move it away to go on from {older[-1]}."
                    if older
                    else "there is no older one."
                )
            ) from error

    def _guard(self, action: Callable[[], Any]) -> None:
        """Runs a saving action; a storage error of any kind becomes an OSError in one line."""
        try:
            action()
        except (OSError, ValueError, RuntimeError) as error:
            steps = self._whole_steps()
            raise OSError(
                f"saving to {self.folder} failed ({_reason(error)}); "
                + (f"checkpoint {steps[-1]} is whole: " if steps else "no checkpoint yet: ")
                + "free the disk and start again."
            ) from error

    def _whole_steps(self) -> list[int]:
        # From the folder itself: after a failed save the manager's own list cannot be trusted.
        # (A bucket has no renaming: there a cut one has its name, too, and lacks a file.)
        steps = (path for path in self.folder.iterdir() if path.name.isdigit())
        return sorted(int(p.name) for p in steps if ocp.utils.is_checkpoint_finalized(p))


def _reason(error: Exception) -> str:
    # TensorStore names the file at each level, and why at the end.
    return " ".join(str(error).rsplit('": ', 1)[-1].split())[:300] or repr(error)


def _state_handler() -> ocp.PyTreeCheckpointHandler:
    # By default each device writes its part of a replicated array: a small program to compile for
    # each shape, seconds of them at the first save. That pays for large arrays only.
    arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=16 << 20)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def checksums(leaves: dict[str, jax.Array]) -> dict[str, int]:
    """A number for each array, whatever its sharding: any one changed bit changes it."""
    sums = {}
    for name, leaf in leaves.items():
        sums[name] = _checksum(leaf)
        if isinstance(leaf, jax.Array) and not leaf.is_fully_replicated:
            # Sums over devices one at a time: many at once make simulated CPU devices wait for
            # each other for ever.
            jax.block_until_ready(sums[name])
    return {name: int(value) for name, value in jax.device_get(sums).items()}


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    # Words times odd numbers, summed modulo 2³²: exact in any order, so the same on any mesh.
    x = jax.device_put(x, jax.memory.Space.Device)  # from the host's memory, if it lies there
    if x.dtype == jnp.bool:
        x = x.astype(jnp.uint8)
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    words = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    index = jnp.uint32(0)
    for axis in range(x.ndim):  # no reshape, which would gather a sharded array
        stride = jnp.uint32(math.prod(x.shape[axis + 1 :]) % 2**32)
        index += stride * jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return (words * (2 * index + 1)).sum(dtype=jnp.uint32)


def unstack(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Scanned blocks' names get the layer's number: 'blocks/norm1/scale' -> 'blocks/0/norm1/…'."""
    out = {}
    for name, leaf in leaves.items():
        if STACKED.match(name):
            out |= zip(layer_names(name, leaf), _unstack(leaf), strict=True)
        else:
            out[name] = leaf
    return out


def unstack_abstract(leaves: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.ShapeDtypeStruct]:
    """`unstack` for shapes; the layer's axis must not be sharded."""
    out = {}
    for name, leaf in leaves.items():
        if STACKED.match(name):
            sharding = leaf.sharding
            if sharding is not None:
                spec = jax.sharding.PartitionSpec(*sharding.spec[1:])
                sharding = jax.sharding.NamedSharding(sharding.mesh, spec)
            part = jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=sharding)
            out |= dict.fromkeys(layer_names(name, leaf), part)
        else:
            out[name] = leaf
    return out


def stack(leaves: dict[str, jax.Array], wanted: dict[str, Any]) -> dict[str, jax.Array]:
    """The inverse of `unstack`, in the order and with the shardings of `wanted`."""
    out = {}
    for name, target in wanted.items():
        if STACKED.match(name):
            parts = [leaves[layer] for layer in layer_names(name, target)]
            out[name] = jax.jit(lambda *x: jnp.stack(x), out_shardings=target.sharding)(*parts)
        else:
            out[name] = leaves[name]
    return out


def _unstack(leaf: jax.Array) -> tuple[jax.Array, ...]:
    sharding = leaf.sharding
    if sharding.memory_kind != "pinned_host":
        return _unstack_on_device(leaf)
    spec = jax.sharding.PartitionSpec(*sharding.spec[1:])
    place = jax.sharding.NamedSharding(sharding.mesh, spec, memory_kind="pinned_host")
    return jax.jit(_unstack_on_device, out_shardings=place)(leaf)


@jax.jit
def _unstack_on_device(leaf: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(jnp.unstack(jax.device_put(leaf, jax.memory.Space.Device)))


def _flat(tree: Any) -> dict[str, Any]:
    return traverse_util.flatten_dict(tree, sep="/")
