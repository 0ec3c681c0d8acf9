"""The loop around the step: builds the parts from a config, then only decides when.

When to log, to evaluate, to save; what a step is stands in `vit_jax/train.py`.
"""

import contextlib
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from etils import epath
from flax import nnx
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from vit_jax import config as config_lib
from vit_jax.checkpoint import Checkpoints
from vit_jax.data.augment import make_augmentation
from vit_jax.data.loader import HOST_ONLY, Loader, make_loader
from vit_jax.data.sources import DatasetInfo, dataset_info
from vit_jax.evaluation import evaluate, fingerprints, make_evals, summary
from vit_jax.feeding import make_feed, put_batch, put_parts
from vit_jax.interop.start import start_from
from vit_jax.metrics import MetricsWriter, Monitor, NoWriter, Stopwatch, read_rows
from vit_jax.runtime import Preempted, Processes, StopSignal
from vit_jax.sharding import check_host_memory, make_mesh
from vit_jax.train import (
    Batch,
    Parts,
    TrainOptions,
    TrainState,
    abstract_state,
    check_batch,
    make_parts,
    make_step,
)
from vit_jax.tree import num_params
from vit_jax.watchdog import Stragglers, Watchdog
from vit_jax.workdir import RunRecord

T = TypeVar("T")


def ahead(items: Iterable[T]) -> Iterator[T]:
    """The items, each made before the one in front of it is handed out.

    So a batch travels to the devices before the step that comes first is even sent to them, and is
    there when they are done with it.
    """
    iterator = iter(items)
    waiting = list(itertools.islice(iterator, 1))
    for following in iterator:
        yield waiting.pop()
        waiting.append(following)
    yield from waiting


class Trainer:
    """One start of a run: builds the parts, takes up the newest checkpoint, and loops.

    Args:
      config: resolved, as the recipes in `configs/` make it.
      workdir: an existing folder, owned by this job.
      clock: started when the process was.
      stop: polled at every step and at every batch of an evaluation.
      processes: of the job; the first one writes, and checkpoints are written by all.
      watchdog: hears of what goes on.

    Raises:
      ValueError: something in the config does not fit; said before anything compiles.
    """

    def __init__(
        self,
        config: ConfigDict,
        workdir: epath.Path,
        *,
        clock: Stopwatch,
        stop: StopSignal,
        processes: Processes | None = None,
        watchdog: Watchdog | None = None,
    ):
        self.config, self.workdir, self.clock, self.stop = config, workdir, clock, stop
        self.processes = Processes() if processes is None else processes
        self.watchdog = Watchdog(workdir / "hosts") if watchdog is None else watchdog
        self.stragglers = Stragglers(self.processes)
        self.watchdog.beat(phase="building")
        with self.processes.together("the check of the config and the data"):
            init = self._build()
        found = fingerprints(self.info, self.evals)
        self.processes.check_same({f"fingerprint of {k}": v[:12] for k, v in found.items()})
        offload = self.options.offload_opt_state
        abstract = abstract_state(init, self.mesh, offload=offload)
        self.num_params = self.parts.num_params
        self.num_trained = num_params(abstract.params)
        keep = {"keep": self.options.keep, "keep_best": self.options.keep_best}
        self.checkpoints = Checkpoints(workdir / "checkpoints", **keep)
        steps = self.processes.gather("the checkpoints", self.checkpoints.steps())[0]
        with self.processes.together("the check of the workdir"):
            self.record = RunRecord(
                workdir,
                config,
                self.info,
                clock,
                fingerprints=found,
                mesh=self.mesh.shape,
                num_params=self.num_params,
                started=bool(steps),  # before, nothing binds a run to its config
                writes=self.processes.is_first,
            )
        self._take_up(init, abstract, steps)

    def _build(self) -> Callable[[], TrainState]:
        """All that needs no device; answers what makes the initial state."""
        config = self.config
        config_lib.check_top_level(config)
        self.options = config_lib.call("train", TrainOptions, config.train)
        self.mesh = config_lib.call("mesh", make_mesh, config.mesh)
        self.info = dataset_info(config.data.name, data_dir=config.data.data_dir)
        self.parts, init = make_parts(config, self.info)
        self.augment = make_augmentation(**config_lib.plain(config.augment))
        self._check_fit()
        self.evals = make_evals(config, self.info, make_feed(self.mesh))
        self._loader(0).check().close()  # what does not fit in the data section is said now
        return init

    def _check_fit(self) -> None:
        options = self.options
        check_batch(self.config.batch_size, self.parts, self.mesh)
        if options.offload_opt_state:
            check_host_memory(self.mesh, "train.offload_opt_state=True")
        if self.config.model.get("remat") == "offload":
            check_host_memory(self.mesh, "model.remat='offload'")
        metric, sections = self.options.best_metric, {"augment": self.config.augment}
        for key, section in self.config.evals.items():
            sections[f"evals.{key}.augment"] = section.get("augment", {})
        for key, section in sections.items():
            size = section.get("size", self.parts.image_size)
            if tuple(size) != self.parts.image_size:
                raise ValueError(
                    f"{key}.size={tuple(size)} and model.image_size={self.parts.image_size} "
                    "differ; make them the same."
                )
        if metric and metric.split("/")[0] not in self.config.evals:
            raise ValueError(
                f"train.best_metric={metric!r} must be EVALUATION/METRIC of the config's evals: "
                f"{', '.join(self.config.evals) or 'none'}; '' turns it off."
            )

    def _take_up(
        self, init: Callable[[], TrainState], abstract: TrainState, steps: list[int]
    ) -> None:
        """The newest checkpoint's state, or a fresh one; files are cut back to it."""
        self.watchdog.beat(phase="restoring")
        if steps:
            self.state, meta = self.checkpoints.restore(steps[-1], abstract)
        else:
            shardings = jax.tree.map(lambda x: x.sharding, abstract)
            self.state, meta = jax.jit(init, out_shardings=shardings)(), {}
            if "init_from" in self.config and self.config.init_from:
                path = self.config.init_from
                self.state = take_weights(self.parts, self.state, path, self.info, shardings)
        self.step = meta.get("step", 0)
        self.writer = NoWriter()
        self.evaluated = dict(self.processes.first("the metrics", self._open_metrics))
        for step, results in self.evaluated.items():
            self._score(step, results)
        self.monitor = Monitor(
            self.writer,
            self.clock,
            batch_size=self.config.batch_size,
            total_steps=self.config.total_steps,
            log_every=self.config.log_every,
            flops_per_image=self.parts.flops_per_image,
            max_skips=self.options.max_skips,
            last_good=self._last_good,
            say=functools.partial(print, flush=True),
            skipped=meta.get("skipped", 0),
            rejected=meta.get("rejected", 0),
        )
        self.finished = self.step == self.config.total_steps and not self._evaluation_due()
        if not self.finished:
            self.record.resume(meta)

    def _open_metrics(self) -> list[tuple[int, dict[str, float]]]:
        """The writer, and what was evaluated up to now, by step."""
        self.writer = MetricsWriter(
            self.workdir, resume_step=self.step, wandb=self.options.wandb, config=self.config
        )
        rows = [
            (row["step"], {k: v for k, v in row.items() if k.split("/")[0] in self.evals})
            for row in read_rows(self.writer.path)
        ]
        return [(step, results) for step, results in rows if results]

    def run(self) -> dict[str, float]:
        """Trains to the end.

        Returns:
          The last evaluation's metrics.

        Raises:
          FloatingPointError: too many updates were not finite.
          OSError: a checkpoint could not be written.
          Preempted: after saving, because of a signal.
        """
        self.clock.switch("steps")
        with contextlib.closing(self.checkpoints), contextlib.closing(self.writer):
            if not self.finished:
                try:
                    if self.step and self._evaluation_due():  # a signal came before it was done
                        self._evaluate()
                    self._loop()
                    self.watchdog.beat(phase="saving")
                    with self.clock("saving"):
                        self.checkpoints.wait()
                    self.record.save()
                finally:  # however it ends; on a full disk the first error counts
                    with contextlib.suppress(OSError):
                        self.record.save()
            return self._evaluated()

    def _loop(self) -> None:
        train_step = None
        with self._loader(self.step) as loader:
            for batch, arrays, host_work in ahead(self._placed(loader)):
                if train_step is None:
                    train_step = self._compile(arrays)
                    self.stop.check()  # nothing is lost: no step was done
                positions = runs_of(batch["position"])
                self.watchdog.beat(step=self.step, positions=positions, phase="training")
                self.state, metrics = train_step(self.state, arrays)
                self.step += 1
                self.monitor.push(self.step, metrics, batch["error"])
                for line in self.stragglers.push(host_work):
                    print(line, flush=True)
                scored = False  # whether this state may turn out to be the best
                try:
                    if self._evaluation_due():
                        self._evaluate()
                        scored = bool(self.options.best_metric)
                except Preempted:
                    pass  # saved below; the evaluation is done when the run is started again
                stopping = bool(self.stop)  # once: a signal after this line waits for the next step
                if stopping or scored or self._due(self.config.save_every):
                    self._save()
                if stopping:
                    raise Preempted

    def _loader(self, start_step: int) -> Loader:
        # Exactly the config's `data` section, and what the run adds to it.
        return config_lib.call(
            "data",
            make_loader,
            self.config.data,
            augment=self.augment,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            start_step=start_step,
            num_steps=self.config.total_steps,
            slots=make_feed(self.mesh).slots(self.config.batch_size),
        )

    def _placed(self, loader: Loader) -> Iterator[tuple[dict[str, np.ndarray], Batch, float]]:
        """Each batch, the same on the devices, and the seconds of work that it took the host."""
        for batch in self.clock.waiting(loader):
            begun = time.monotonic()
            arrays = {key: value for key, value in batch.items() if key not in HOST_ONLY}
            arrays = self._put(arrays)
            yield batch, arrays, loader.seconds + time.monotonic() - begun

    def _put(self, batch: dict[str, np.ndarray]) -> Batch:
        put = put_parts if self.options.spmd == "pmap" else put_batch
        return put(batch, self.mesh)

    def _compile(self, batch: Batch) -> Callable:
        print("compiling the training step …", flush=True)
        self.watchdog.beat(step=self.step, phase="compiling")
        with self.clock("compile"):
            start = time.time()
            step = make_step(self.parts, self.state, self.mesh)
            compiled = step.lower(self.state, batch).compile()
        print(f"compiled in {time.time() - start:.1f} s", flush=True)
        return compiled

    def _evaluate(self) -> None:
        self.monitor.flush()
        print(f"step {self.step} | evaluating …", flush=True)
        with self.clock("evaluation"):
            model = self.parts.model(self.state)
            results = evaluate(self.evals, model, self.mesh, self._check_in_evaluation)
        self.watchdog.beat(phase="training")
        metric = self.options.best_metric
        if metric and metric not in results:
            raise ValueError(
                f"train.best_metric={metric!r} is not among the metrics of this evaluation: "
                f"{', '.join(results)}."
            )
        self.writer.write(self.step, results)
        self.evaluated[self.step] = results
        self._score(self.step, results)
        print(f"step {self.step} | " + summary(results), flush=True)

    def _check_in_evaluation(self) -> None:
        self.watchdog.beat(phase="evaluation")
        self.stop.check()

    def _save(self) -> None:
        self.watchdog.beat(phase="saving")
        self.monitor.flush()  # only a state whose step was found finite is kept
        with self.clock("saving"):
            self.checkpoints.save(self.step, self.state, self._meta())
        self.record.save()

    def _meta(self) -> dict[str, Any]:
        preprocess = self.parts.preprocess
        return {
            "step": self.step,
            "time": time.time(),
            "seconds": self.clock.snapshot(),
            "skipped": self.monitor.skipped,
            "rejected": self.monitor.rejected,
            "versions": self.record.values["versions"],
            "dataset": self.record.values["dataset"],
            "fingerprints": self.record.values["fingerprints"],
            "preprocess": {"mean": preprocess.mean, "std": preprocess.std},
            "config": config_lib.plain(self.config),
        }

    def _due(self, cadence: int) -> bool:
        last = self.step == self.config.total_steps
        return last or bool(cadence and self.step % cadence == 0)

    def _evaluation_due(self) -> bool:
        return bool(self.evals) and self._due(self.config.eval_every) and not self._evaluated()

    def _evaluated(self) -> dict[str, float]:
        return self.evaluated.get(self.step, {})

    def _score(self, step: int, values: Mapping[str, float]) -> None:
        value = values.get(self.options.best_metric)
        if value is not None and math.isfinite(value):
            self.checkpoints.score(step, value)

    def _last_good(self) -> str:
        self.checkpoints.wait()
        steps = self.checkpoints.steps()
        return str(self.workdir / "checkpoints" / str(steps[-1])) if steps else "the initial state"


def runs_of(positions: np.ndarray) -> list[list[int]]:
    """The first and last of each run of neighbours: [[0, 3], [8, 11]]."""
    ends = np.flatnonzero(np.diff(positions) != 1)
    starts, ends = np.r_[0, ends + 1], np.r_[ends, len(positions) - 1]
    return np.stack([positions[starts], positions[ends]], axis=1).tolist()


def take_weights(
    parts: Parts, state: TrainState, path: str, info: DatasetInfo, shardings: TrainState
) -> TrainState:
    """A new run's state with the parameters of `path` in it; says what became of each of them.

    No device ever holds more of it than `shardings` gives it.

    Args:
      parts: see `Parts`.
      state: as it was drawn; donated.
      path: see `interop.load`.
      info: of the training dataset, for its classes.
      shardings: of the state.

    Raises:
      ValueError: the weights cannot be read, or are of another backbone.
    """
    backbone, objective = parts.merge(state.params, state.non_trainable)
    modules = dict(zip(parts.graphdefs, (backbone, objective), strict=True))
    drawn = {  # frozen ones come in, too
        name: nnx.to_pure_dict(nnx.state(module, nnx.Param)) for name, module in modules.items()
    }
    places = jax.tree.map(lambda leaf: leaf.sharding, drawn)
    if jax.process_count() > 1:
        drawn = multihost_utils.process_allgather(drawn, tiled=True)
    model = objective.model(backbone)
    filled, report = start_from(path, drawn, model, class_names=info.class_names)
    print(f"starting from {path}", *report.lines(), sep="\n", flush=True)

    def start(state: TrainState, filled: dict[str, Any]) -> TrainState:
        modules = parts.merge(state.params, state.non_trainable)
        for name, module in zip(parts.graphdefs, modules, strict=True):
            nnx.update(module, filled[name])
        return parts.start(*modules)

    # The new state takes the drawn one's memory, which it does not read.
    start = jax.jit(start, out_shardings=shardings, donate_argnums=0, keep_unused=True)
    return start(state, jax.tree.map(_put, filled, places))


def _put(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """An array that every process has, each device getting its part."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
