"""Where tests find a data set that this project does not bring along."""

import os
import pathlib

# CIFAR-10 as an archive of <split>/<class>/*.jpg; without one its tests are skipped.
_BESIDE = pathlib.Path(__file__).parents[2] / "shared" / "data" / "cifar10_jpg.zip"
CIFAR10 = pathlib.Path(os.environ.get("VIT_JAX_CIFAR10") or _BESIDE)
NO_CIFAR10 = "no archive of CIFAR-10's JPEGs; VIT_JAX_CIFAR10 says where one is"
