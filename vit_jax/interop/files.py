"""Files of arrays: reading without unpickling, writing whole or not at all."""

import contextlib
import hashlib
import io
import json
import re
import shutil
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from vit_jax.leftovers import hidden, remove_leftovers

Arrays = dict[str, np.ndarray]

PICKLED = (".pth", ".pt", ".bin", ".ckpt", ".pkl", ".pickle")
GRAPHS = (".stablehlo", ".onnx")  # to run, not to read
CERTIFICATE, IMPORTED = "certificate.json", "import.json"  # what export and import leave
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PART = re.compile(r".*-\d{5}-of-(\d{5})\.safetensors")
DTYPES = {  # the library's own reader knows no bfloat16
    **{"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16},
    **{"I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8},
    **{"U8": np.uint8, "BOOL": np.bool_},
}
MAX_HEADER = 100_000_000  # bytes, the format's own bound
DAMAGED_NPZ = (  # what zipfile, zlib and NumPy's header parser raise, one or other
    *(zipfile.BadZipFile, zlib.error, tokenize.TokenError, RuntimeError),
    *(EOFError, OSError, KeyError, MemoryError, TypeError),
)


def read_arrays(path: epath.Path) -> Arrays:
    """The arrays of a `.safetensors` or `.npz` file by name.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a pickle (with the way out), another kind of file, a damaged one.
    """
    suffix = path.suffix.lower()
    if suffix in PICKLED:
        raise ValueError(refusal(path))
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    if suffix == ".npz":
        return _read_npz(path)
    if suffix == ".safetensors":
        return _read_safetensors(path)
    if suffix in GRAPHS:
        raise ValueError(f"{path} is a whole graph; export the weights by --format=safetensors.")
    raise ValueError(f"{path} is neither .safetensors nor .npz; convert it to one of them.")


def read_folder(folder: epath.Path) -> Arrays:
    """The arrays of a model folder: one `model.safetensors`, several by an index, or one file.

    Raises:
      FileNotFoundError: no weights there.
      ValueError: only pickled ones, or damaged ones.
    """
    if only := only_file(folder):
        check_whole(only)
        return read_arrays(only)
    if (folder / INDEX).exists():
        return _read_parts(folder)
    files = _weights(folder)
    pickled = [p for p in folder.iterdir() if p.suffix in PICKLED]
    if pickled and not files:
        raise ValueError(refusal(sorted(pickled)[0]))
    raise FileNotFoundError(
        f"{folder} holds {len(files) or 'no'} .safetensors or .npz files; give the path of one."
    )


def only_file(folder: epath.Path) -> epath.Path | None:
    """The one file that holds a folder's weights; None if it is none, or several."""
    if (folder / SINGLE).exists():
        return folder / SINGLE
    files = _weights(folder)
    return files[0] if len(files) == 1 and not (folder / INDEX).exists() else None


def check_whole(path: epath.Path) -> None:
    """Raises ValueError for one part of several: the others' arrays would only seem not to be."""
    part = PART.fullmatch(path.name)
    if part and int(part[1]) > 1:
        raise ValueError(
            f"{path} is one part of {int(part[1])}: fetch the others and their index, "
            f"{INDEX}, and give the folder."
        )


def _weights(folder: epath.Path) -> list[epath.Path]:
    return sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".npz"))


def _read_parts(folder: epath.Path) -> Arrays:
    """All files that the index names, with all arrays that it says are in them."""
    index = folder / INDEX
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(x, str) for x in places.values()):
        raise ValueError(_damaged(index, "weight_map is no object of file names"))
    arrays = {}
    for name in sorted(set(places.values())):
        if epath.Path(name).name != name:
            raise ValueError(f"{index} points outside of its folder: {name!r}.")
        arrays |= read_arrays(folder / name)
    if absent := sorted(places.keys() - arrays.keys()):
        raise ValueError(
            f"{folder} lacks {absent[0]}, which {INDEX} says is in {places[absent[0]]}; "
            "fetch the files again."
        )
    return arrays


def refusal(path: epath.Path) -> str:
    """Why a pickle is not read, and the two lines that convert it, to be pasted into Python."""
    target = path.with_suffix(".safetensors")
    return (
        f"{path} is a pickle, which can run code when it is read; convert it where torch is: "
        f"import torch; state = torch.load({str(path)!r}, map_location='cpu', weights_only=True); "
        "import safetensors.torch; "
        "state = {k: x.clone().contiguous() for k, x in state.get('model', state).items()}; "
        f"safetensors.torch.save_file(state, {str(target)!r})"
    )


def read_json(path: epath.Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
      ValueError: damaged, or no object.
    """
    try:
        values = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); fetch it again.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, not a JSON object.")
    return values


def safetensors_metadata(path: epath.Path) -> dict[str, str]:
    """The file's own metadata; {} if it has none."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = file.read(min(size, MAX_HEADER))
    try:
        metadata = json.loads(header).get("__metadata__", {})
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError) as error:
        raise ValueError(_damaged(path, "its header is no JSON")) from error
    if not isinstance(metadata, dict) or not all(isinstance(x, str) for x in metadata.values()):
        raise ValueError(_damaged(path, "its metadata are no texts"))
    return metadata


def _read_safetensors(path: epath.Path) -> Arrays:
    try:
        members = safetensors.deserialize(path.read_bytes())
    except (safetensors.SafetensorError, MemoryError) as error:
        raise ValueError(_damaged(path, error)) from error
    arrays = {}
    for name, member in sorted(members, key=lambda member: member[0]):  # theirs is arbitrary
        if member["dtype"] not in DTYPES:
            raise ValueError(f"{path}: {name} is {member['dtype']}; save it as float32.")
        data = np.frombuffer(member["data"], DTYPES[member["dtype"]])
        arrays[name] = data.reshape(member["shape"])
    return arrays


def _read_npz(path: epath.Path) -> Arrays:
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as members:
            return {name: members[name] for name in members.files}
    except ValueError as error:
        if "allow_pickle" in str(error):
            raise ValueError(
                f"{path} has pickled members, which can run code when they are read; save it "
                "again with plain arrays: np.savez(path, **arrays)."
            ) from error
        raise ValueError(_damaged(path, error)) from error
    except DAMAGED_NPZ as error:
        raise ValueError(_damaged(path, error)) from error


def _damaged(path: epath.Path, why: Any) -> str:
    return f"{path} is damaged or cut short ({why}); fetch or copy it again."


@contextlib.contextmanager
def new_file(path: epath.PathLike, *, overwrite: bool) -> Iterator[epath.Path]:
    """A path beside `path` to write to; it takes the name when the block ends well.

    Raises:
      FileExistsError: `path` exists and may not be overwritten.
    """
    if epath.Path(path).is_dir():
        raise FileExistsError(f"{path} is a folder, not a file; choose another --out.")
    path, beside = _beside(path, overwrite)
    try:
        yield beside
        beside.replace(path)
        remove_leftovers(path.parent, re.escape(path.name))
    finally:
        beside.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: epath.PathLike, *, overwrite: bool) -> Iterator[epath.Path]:
    """A folder beside `path` to fill; it takes the name when the block ends well.

    Raises:
      FileExistsError: `path` exists, and may not be overwritten or is no folder of ours.
    """
    check_folder(path, overwrite=overwrite)
    path, beside = _beside(path, overwrite)
    beside.mkdir()
    old = beside.with_name(f"{beside.name}.old")
    try:
        yield beside
        if path.exists():
            path.rename(old)
        beside.rename(path)
        remove_leftovers(path.parent, re.escape(path.name))
    finally:
        if old.exists() and not path.exists():  # an error or a signal between the two renames
            old.rename(path)
        for left in (beside, old):
            if left.exists():
                _remove(left)


def check_folder(path: epath.PathLike, *, overwrite: bool) -> None:
    """Raises FileExistsError where `new_folder` may not write: it replaces exports and imports."""
    path = epath.Path(path)
    _check_free(path, overwrite)
    if not path.exists():
        return
    if not path.is_dir():
        raise FileExistsError(f"{path} is a file, not a folder; choose another --out.")
    found = {child.name for child in path.iterdir()}
    if found and not found & {CERTIFICATE, IMPORTED}:
        raise FileExistsError(
            f"{path} holds no export or import of ours and is not replaced; choose another --out."
        )


def _check_free(path: epath.Path, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; choose another --out or add --overwrite.")


def _beside(path: epath.PathLike, overwrite: bool) -> tuple[epath.Path, epath.Path]:
    path = epath.Path(path)
    _check_free(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path, hidden(path)


def _remove(path: epath.Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def write_safetensors(
    path: epath.Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Writes one file."""
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    path.write_bytes(safetensors.numpy.save(contiguous, dict(metadata)))


def write_npz(path: epath.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes one file, uncompressed: weights do not compress."""
    with path.open("wb") as file, zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)


def write_json(path: epath.Path, values: Mapping[str, Any]) -> None:
    """Writes one object for people and machines."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def sha256(path: epath.Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
