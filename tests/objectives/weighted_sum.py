"""Several objectives on one backbone."""

from collections.abc import Mapping
from typing import Any

from flax import nnx

from vit_jax import config as config_lib
from vit_jax.models.layers import fold_in
from vit_jax.objectives import OBJECTIVES, Objective, Output


class WeightedSum(Objective):
    """The weighted sum of the losses; what evaluation sees is the first one's model.

    Args:
      parts: {key: {'name': …, 'weight': …, …}}, the rest being that objective's own arguments.
    """

    def __init__(self, *, backbone, num_classes: int, preprocess, parts: Mapping[str, Any], rngs):
        self.keys, self.weights = tuple(parts), {}
        self.parts = nnx.Dict()
        given = {"backbone": backbone, "num_classes": num_classes, "preprocess": preprocess}
        for key, section in parts.items():
            objective, options = config_lib.choose(f"objective.parts.{key}", OBJECTIVES, section)
            self.weights[key] = options.pop("weight")
            self.parts[key] = config_lib.call(key, objective, options, **given, rngs=rngs)

    @property
    def trainable(self):
        """What each part trains, below its own name."""
        return nnx.Any(
            *(nnx.All(nnx.PathContains(key), self.parts[key].trainable) for key in self.keys)
        )

    def __call__(self, backbone, batch, *, step, key, train):
        loss, metrics, aux = 0.0, {}, {}
        for number, name in enumerate(self.keys):
            keys = fold_in(key, number)
            value, output = self.parts[name](backbone, batch, step=step, key=keys, train=train)
            loss += self.weights[name] * value
            metrics |= {f"{name}_{key}": pair for key, pair in output.metrics.items()}
            aux[name] = output.aux
        return loss, Output(metrics, aux)

    def after_update(self, backbone, aux, step):
        for name in self.keys:
            self.parts[name].after_update(backbone, aux[name], step)

    def model(self, backbone):
        return self.parts[self.keys[0]].model(backbone)
