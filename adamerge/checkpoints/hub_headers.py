"""Remote headers: a model on the Hub by names, shapes and dtypes alone, before anything of it is downloaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch

from adamerge.checkpoints.checkpoint import Checkpoint
from adamerge.checkpoints.opening import is_hub_id, open_checkpoint
from adamerge.checkpoints.renamed_checkpoint import under_names_of
from adamerge.errors import CheckpointError
from adamerge.io.dtypes import TORCH_DTYPES
from adamerge.io.safetensors_file import BITS
from adamerge.io.untrusted_files import quoted


class RemoteCheckpoint(Checkpoint):
    """What the headers of a model on the Hub say; its tensors cannot be read.

    Args:
        location: Hub id.
        headers: name to dtype, as the format writes it, and shape.
    """

    def __init__(self, location: str, headers: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        self.location = location
        self._entries = {name: headers[name] for name in sorted(headers)}

    def __getitem__(self, name: str) -> torch.Tensor:
        self._refuse(name)

    def shape(self, name: str) -> torch.Size:
        """Returns the shape of one tensor."""
        return torch.Size(self._entry(name)[1])

    def dtype(self, name: str) -> torch.dtype:
        """Returns the dtype of one tensor; CheckpointError if torch has none such."""
        written = self._entry(name)[0]
        if written not in BITS or written not in TORCH_DTYPES:
            what = f"{quoted(self.location)}: tensor {quoted(name)} has dtype {written}, which torch lacks"
            raise CheckpointError(what, todo="exclude it, or use a checkpoint that is not quantised")
        return TORCH_DTYPES[written]

    def _stored(self, name: str) -> tuple[str, tuple[int, ...], Iterator[memoryview]]:
        self._refuse(name)

    def _refuse(self, name: str) -> NoReturn:
        raise CheckpointError(f"{quoted(self.location)} is not on this machine: {quoted(name)} cannot be read")


def open_headers(source: str | Path | Mapping[str, torch.Tensor], base: Checkpoint | None = None) -> Checkpoint:
    """``open_checkpoint`` without downloading a model: of one that is on the Hub alone, the headers are asked for.

    A LoRA adapter is downloaded, being small. Of ``model+adapter`` the model is taken to be ``base``.

    Raises:
        CheckpointError: as ``open_checkpoint``.
    """
    if isinstance(source, str) and base is not None and source.count("+") == 1:
        adapter = source.partition("+")[2]
        if is_hub_id(adapter) or Path(adapter).expanduser().is_dir():
            source = adapter
    if not isinstance(source, str) or not is_hub_id(source):
        return open_checkpoint(source, base)
    import huggingface_hub  # here, because local models need no hub
    from huggingface_hub.errors import NotASafetensorsRepoError

    name, _, revision = source.partition("@")
    local = _cached(huggingface_hub, name, revision or None)
    if local is not None:
        return open_checkpoint(local, base)
    try:
        metadata = huggingface_hub.get_safetensors_metadata(name, revision=revision or None)
    except NotASafetensorsRepoError:
        return open_checkpoint(source, base)
    except Exception as error:  # the client raises its own errors, the network's and some plain ones
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{quoted(source)} is not on this machine, and the Hugging Face hub does not tell its headers: {reason}",
            todo="check name and network, or download it first",
        ) from error
    headers = {
        tensor: (info.dtype, tuple(info.shape))
        for file in metadata.files_metadata.values()
        for tensor, info in file.tensors.items()
    }
    remote = RemoteCheckpoint(source, headers)
    return remote if base is None else under_names_of(base, remote)


def _cached(hub: Any, name: str, revision: str | None) -> str | None:
    """Folder of a model that was downloaded before; None where it was not, or not all of it."""
    try:
        folder: str = hub.snapshot_download(name, revision=revision, local_files_only=True)
        open_checkpoint(folder)
    except Exception:
        return None
    return folder
