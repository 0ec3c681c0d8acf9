"""What a model is measured by. A new evaluation is a class with `run` and a row here."""

from vit_jax.evals.classification import Classification

EVALS = {"classification": Classification}

__all__ = ["EVALS"]
