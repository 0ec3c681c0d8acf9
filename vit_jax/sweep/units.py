"""Units of work: which there are, and doing one."""

import collections
import contextlib
import dataclasses
import hashlib
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx

from vit_jax.config import call, check_keys, choose, plain
from vit_jax.data.sources import dataset_info
from vit_jax.evals import EVALS
from vit_jax.evals.base import Evaluation, Scores
from vit_jax.features import FeatureCache, Features, check_names, extract, feature_key
from vit_jax.feeding import pad_batch, put_batch
from vit_jax.functional import Functional, Merge
from vit_jax.interop.load import read_source
from vit_jax.interop.spec import Spec, fill, make_model
from vit_jax.models.model import Model
from vit_jax.sharding import make_mesh, replicated
from vit_jax.sweep.checkpoints import Checkpoint, digest
from vit_jax.sweep.store import Store, Unit

# Of a dataset's section: where it lies and how fast it is read, which changes no number.
SPEED = ("data_dir", "batch_size", "num_workers", "strict")
AUGMENT = {"name": "resize_center_crop"}  # to the model's size, where the section names none


class Busy(Exception):
    """Another worker is making what this unit needs."""


def make_units(
    checkpoints: Sequence[Checkpoint],
    datasets: Mapping[str, Mapping[str, Any]],
    evals: Mapping[str, Mapping[str, Any]],
) -> list[tuple[Unit, Checkpoint]]:
    """Every checkpoint × dataset × evaluation.

    Args:
      checkpoints: see `Finder`.
      datasets: name -> `Evaluation`'s arguments; without `augment.size` it is the model's.
      evals: name -> {'name': in EVALS, and its settings}.

    Raises:
      FileNotFoundError, ValueError: a dataset, or a file that an evaluation reads, is not there; an
        evaluation is unknown, or a key of either.
    """
    infos = {name: _info(name, section) for name, section in datasets.items()}
    settings = {key: _settings(key, section) for key, section in evals.items()}
    return [
        (
            _unit(checkpoint, dataset, datasets[dataset], infos[dataset], key, settings[key]),
            checkpoint,
        )
        for checkpoint in checkpoints
        for dataset in datasets
        for key in evals
    ]


def make_settings(
    datasets: Mapping[str, Mapping[str, Any]], evals: Mapping[str, Mapping[str, Any]]
) -> list[tuple[str, str, str]]:
    """(dataset, evaluation, config digest) of every pair, known before there is a checkpoint.

    Raises ValueError of an evaluation's section, as `make_units` does.
    """
    settings = {key: _settings(key, section) for key, section in evals.items()}
    return [
        (dataset, key, digest(_together(datasets[dataset], settings[key])))
        for dataset in datasets
        for key in evals
    ]


def _info(name: str, section: Mapping[str, Any]) -> Any:
    if "dataset" not in section:
        raise ValueError(
            "each of the sweep's datasets needs a 'dataset': the name it was prepared by."
        )
    check_keys(f"datasets.{name}", Evaluation, {"augment": AUGMENT} | plain(section), ["feed"])
    return dataset_info(section["dataset"], data_dir=section.get("data_dir", "data"))


def _settings(key: str, section: Mapping[str, Any]) -> dict[str, Any]:
    """Of an evaluation: its section, and digests of the files that it names."""
    protocol, options = choose(f"evals.{key}", EVALS, section)
    of_data = [field.name for field in dataclasses.fields(Evaluation)]
    for name in options:
        if name in of_data and name != "feed":
            raise ValueError(
                f"evals.{key}.{name} belongs into the sweep's datasets: every evaluation scores "
                "each of them; for another split or recipe add a dataset of another name."
            )
    check_keys(f"evals.{key}", protocol, options, of_data)
    settings = {"eval": plain(section)}
    for name in protocol.FILES:
        if path := options.get(name):
            if not epath.Path(path).is_file():
                raise FileNotFoundError(f"evals.{key}.{name}={path!r} is no file.")
            settings[name] = hashlib.sha256(epath.Path(path).read_bytes()).hexdigest()[:16]
    return settings


def _together(section: Mapping[str, Any], evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """A dataset's and an evaluation's settings that decide the result."""
    kept = {name: value for name, value in plain(section).items() if name not in SPEED}
    return {"dataset": kept, **evaluation}


def _unit(checkpoint, dataset, section, info, key, evaluation) -> Unit:
    settings = _together(section, evaluation)
    config_digest = digest(settings)
    what = [checkpoint.digest, checkpoint.image_size, info.fingerprint, config_digest]
    step = "" if checkpoint.step is None else f"-{checkpoint.step}"
    label = re.sub(r"[^\w.=,-]+", "_", f"{checkpoint.name[-80:]}{step}-{dataset}-{key}").strip("_")
    return Unit(
        id=f"{label}-{digest([checkpoint.name, checkpoint.step, dataset, key, *what])}",
        checkpoint=checkpoint.name,
        step=checkpoint.step,
        dataset=dataset,
        split=section.get("split", "test"),
        eval=key,
        protocol=settings["eval"]["name"],
        config_digest=config_digest,
        checkpoint_digest=checkpoint.digest,
        run=checkpoint.path,
        settings=settings,
        dataset_fingerprint=info.fingerprint,
    )


class Evaluator:
    """Does units; keeps the model, the evaluations and the programs that the next one may need.

    Args:
      store: of the sweep; its leases guard the features.
      datasets, evals: of the sweep's file, see `make_units`.
      check_stop: called at every batch; may raise to give up.
    """

    def __init__(
        self,
        store: Store,
        datasets: Mapping[str, Mapping[str, Any]],
        evals: Mapping[str, Mapping[str, Any]],
        *,
        check_stop: Callable[[], None] = lambda: None,
    ):
        self.store, self.datasets, self.evals = store, datasets, evals
        self.check_stop = check_stop
        self.cache = FeatureCache(store.folder / "features")
        self.mesh = make_mesh()
        self.extracted, self._computing = 0, 0.0  # feature sets, and seconds, of this process
        self._model: tuple[str, Functional] | None = None
        self._evaluations: dict[tuple, Evaluation] = {}

    def __call__(self, unit: Unit, checkpoint: Checkpoint) -> str:
        """Measures and keeps the result; answers what that took, in words.

        Raises:
          Busy: another worker extracts the features.
          ValueError, OSError, …: the unit fails.
        """
        start, extracted, computing = time.perf_counter(), self.extracted, self._computing
        compiled = num_compiled()
        if checkpoint.error:
            raise OSError(checkpoint.error)
        evaluation = self._evaluation(checkpoint, unit.dataset, unit.eval)
        if evaluation.info.fingerprint != unit.dataset_fingerprint:  # prepared again meanwhile
            self._evaluations.clear()
            evaluation = self._evaluation(checkpoint, unit.dataset, unit.eval)
        reader = _Reader(self, checkpoint, unit.dataset)
        with self._counted(reader):
            scores: Scores = evaluation.measure(reader)
        values = [value._asdict() for value in scores.values]
        seconds = time.perf_counter() - start
        self.store.save_result(unit, values, scores.artefacts, seconds=seconds)
        beside = time.perf_counter() - start - (self._computing - computing)
        return (
            f"{self.extracted - extracted} feature sets extracted, {num_compiled() - compiled} "
            f"programs compiled, {beside:.2f} s beside computing"
        )

    @contextlib.contextmanager
    def _counted(self, reader: "_Reader") -> Iterator[None]:
        """Adds to the seconds of computing the block's, but those of getting features."""
        start, waited = time.perf_counter(), reader.seconds
        yield
        self._computing += time.perf_counter() - start - (reader.seconds - waited)

    def model(self, checkpoint: Checkpoint) -> Functional:
        """Its weights on the devices; programs are shared by all models of one shape."""
        key = f"{checkpoint.path}@{checkpoint.step}@{checkpoint.digest}"
        if self._model is None or self._model[0] != key:
            source = read_source(checkpoint.path, step=checkpoint.step)
            graphdef, state = nnx.split(fill(_module(source.spec), source.params))
            variables = jax.device_put(nnx.to_pure_dict(state), replicated(self.mesh))
            build = _shared(source.spec.to_json(), Merge(graphdef))
            self._model = key, Functional(build, variables)
        return self._model[1]

    def features(self, evaluation: Evaluation, checkpoint: Checkpoint, dataset: str, split: str):
        """The features of a split, with all that the sweep's evaluations want of them."""
        augment = _augment(self.datasets[dataset], checkpoint)
        key = feature_key(checkpoint.digest, evaluation.info.fingerprint, split, augment)
        names = evaluation.wants[split]
        found = self.cache.load(key, names)
        if found is None:
            with self.store.lease(f"features-{key}") as mine:
                if not mine:
                    raise Busy
                if self.cache.load(key, names) is None:
                    self.cache.drop_damaged(key)
                    self._extract(evaluation, checkpoint, dataset, split, key)
            found = self.cache.load(key, names)
        return found

    def _extract(self, evaluation, checkpoint, dataset, split, key) -> None:
        model = self.model(checkpoint)
        module = model.module()
        check_names(module, evaluation.wants[split])
        wanted = set(evaluation.wants[split])
        for name in self.evals:
            try:
                others = self._evaluation(checkpoint, dataset, name).wants.get(split, ())
                check_names(module, others)
            except (ValueError, OSError):  # that one's own unit says it
                continue
            wanted |= set(others)
        names = sorted(wanted - self.cache.names(key))
        options = {"put": self._put, "check_stop": self.check_stop}
        start = time.perf_counter()
        found = extract(model, evaluation.loader(split), names, **options)
        self._computing += time.perf_counter() - start
        self.cache.save(key, found)
        self.extracted += 1

    def _put(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        return put_batch(pad_batch(batch, self.mesh), self.mesh)

    def _evaluation(self, checkpoint: Checkpoint, dataset: str, key: str) -> Evaluation:
        which = dataset, key, checkpoint.image_size, checkpoint.class_names
        if which not in self._evaluations:
            protocol, options = choose(f"evals.{key}", EVALS, self.evals[key])
            section = plain(self.datasets[dataset]) | options
            section["augment"] = _augment(self.datasets[dataset], checkpoint)
            names = {"class_names": checkpoint.class_names}
            if "class_names" in options:
                names = {}
            self._evaluations[which] = call(f"evals.{key}", protocol, section, **names)
        return self._evaluations[which]


class _Reader:
    """`Reader` for one checkpoint and dataset."""

    def __init__(self, evaluator: Evaluator, checkpoint: Checkpoint, dataset: str):
        self._evaluator, self._checkpoint, self._dataset = evaluator, checkpoint, dataset
        self.seconds = 0.0  # of getting the model and features

    @property
    def model(self) -> Functional:
        return self._timed(self._evaluator.model, self._checkpoint)

    def features(self, evaluation: Evaluation, split: str) -> Features:
        where = evaluation, self._checkpoint, self._dataset, split
        return self._timed(self._evaluator.features, *where)

    def _timed(self, get: Callable, *arguments: Any) -> Any:
        start = time.perf_counter()
        try:
            return get(*arguments)
        finally:
            self.seconds += time.perf_counter() - start


def _augment(section: Mapping[str, Any], checkpoint: Checkpoint) -> dict[str, Any]:
    augment = dict(plain(section.get("augment", AUGMENT)))
    return {"size": list(checkpoint.image_size)} | augment


_EVENTS: collections.Counter[str] = collections.Counter()  # of jax, in this process


def _count(event: str, *_: Any, **__: Any) -> None:
    _EVENTS[event] += 1


jax.monitoring.register_event_duration_secs_listener(_count)


def num_compiled() -> int:
    """How many programs this process has compiled by now, or read from the compilation cache."""
    return _EVENTS["/jax/core/compile/backend_compile_duration"]


_MODULES: dict[str, Model] = {}


def _module(spec: Spec) -> Model:
    """The module without numbers, traced once for all models of one shape."""
    key = spec.to_json()
    if key not in _MODULES:
        _MODULES[key] = make_model(spec)
    return _MODULES[key]


_BUILDS: dict[str, Merge] = {}


def _shared(spec: str, build: Merge) -> Merge:
    """The first of this shape: an equal graphdef that is another object may compile anew."""
    return _BUILDS.setdefault(spec, build)
