"""What a backbone is trained for. A new objective is a module and a row here."""

from vit_jax.objectives.base import Model, Objective, Output
from vit_jax.objectives.supervised import Supervised

OBJECTIVES = {"supervised": Supervised}

__all__ = ["OBJECTIVES", "Model", "Objective", "Output"]
