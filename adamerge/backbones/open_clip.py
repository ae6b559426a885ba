"""open_clip image towers with frozen zero-shot heads made by the base's own text tower."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adamerge.backbones.base import Backbone
from adamerge.backbones.hidden_states import captured
from adamerge.backbones.inputs import Inputs
from adamerge.backbones.output import Encoded
from adamerge.backbones.transformers import TOKENIZER_FILES, files_of
from adamerge.backbones.zero_shot_head import Task, ZeroShotHead, class_embeddings
from adamerge.checkpoints.checkpoint import Checkpoint
from adamerge.errors import CheckpointError, ConfigError, did_you_mean
from adamerge.io.links import refuse_links_outside
from adamerge.io.model_folder import Layout
from adamerge.io.untrusted_files import read_json
from adamerge.io.untrusted_settings import refuse_harmful

CONFIG = "open_clip_config.json"
PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")


class OpenClipClassifier(Backbone):
    """An open_clip model as a classifier: image tower, then the zero-shot head of the sample's task.

    Args:
        architecture: an open_clip name such as ``ViT-B-32-quickgelu``, or a folder with ``open_clip_config.json``.
        dtype: of the merged copy.

    Raises:
        ConfigError: open_clip does not know the architecture.
        CheckpointError: the folder's configuration is unusable.

    Reference: CLIP (Radford et al., 2021), https://arxiv.org/abs/2103.00020, section 3.1.4.
    """

    zero_shot = True

    def __init__(self, architecture: str, dtype: str = "float32") -> None:
        self.refuse_early({"architecture": architecture})
        import open_clip  # after what needs no library: importing it takes seconds

        self.architecture, self.dtype, folder = architecture, dtype, Path(architecture).expanduser()
        if folder.is_dir():
            refuse_links_outside(folder)
            refuse_harmful(folder)
            config, identifier = read_json(folder / CONFIG), f"local-dir:{folder}"
            if not isinstance(config.get("model_cfg"), dict):
                raise CheckpointError(f"{folder / CONFIG}: 'model_cfg' is missing or not an object")
            self.model_config: dict[str, Any] = config["model_cfg"]
        else:
            self.model_config, identifier = open_clip.get_model_config(architecture), architecture
        try:
            with _without_warning():  # that there are no weights yet: they are filled in right after
                # weights of a text tower alone would be fetched, and filled over
                self.network: Any = open_clip.create_model(identifier, load_weights=False, pretrained_text=False)
            self.tokenizer = _tokenizer(identifier, self._text_config)
        except Exception as error:  # the libraries raise what their parts raise
            raise CheckpointError(f"architecture '{architecture}': open_clip cannot build it: {error!r}") from error
        self.preprocess_config: dict[str, Any] = dict(open_clip.get_model_preprocess_cfg(self.network))
        self.network.to(getattr(torch, dtype)).eval()
        self.heads = {}
        self._transform, self._mean, self._std = _split_normalisation(self.preprocess_config)

    @classmethod
    def refuse_early(cls, arguments: Mapping[str, Any]) -> None:
        """Refuses an architecture that is neither a folder nor among the configurations that open_clip comes with."""
        name = str(arguments.get("architecture"))
        if Path(name).expanduser().is_dir() or name.startswith(("hf-hub:", "local-dir:")):
            return
        known = _architectures()
        if name in known:
            return
        raise ConfigError(
            f"model.backbone.architecture: '{name}' is neither a folder nor a model that open_clip knows"
            f"{did_you_mean(name, known)}",
            todo="python -c 'import open_clip; print(open_clip.list_models())' lists the names",
        )

    @property
    def _text_config(self) -> dict[str, Any]:
        config = self.model_config.get("text_cfg")
        return config if isinstance(config, dict) else {}

    def tensors(self) -> Mapping[str, Tensor]:
        """Returns open_clip's state dict, whose names are the on-disk names; it ties nothing."""
        return self.network.state_dict(keep_vars=True)

    def trains(self, name: str) -> bool:
        """Returns True for the image tower alone: heads are frozen, made by the base's text tower."""
        return name.startswith("visual.")

    def check_base(self, base: Checkpoint) -> None:
        """Checks that activation and preprocessing, which are in no weight, are those of the base's configuration."""
        path = base.sources[0].parent / CONFIG if base.sources else None
        if path is None or not path.is_file():
            return
        theirs = read_json(path)
        model, images = theirs.get("model_cfg"), theirs.get("preprocess_cfg")
        stated = {"quick_gelu": bool(model.get("quick_gelu"))} if isinstance(model, dict) else {}
        stated |= {key: images[key] for key in PREPROCESSING if key in images} if isinstance(images, dict) else {}
        own = {"quick_gelu": bool(self.model_config.get("quick_gelu")), **self.preprocess_config}
        for key, value in stated.items():
            if key in own and _plain(own[key]) != _plain(value):
                raise CheckpointError(
                    f"architecture '{self.architecture}': its {key} is not that of the base",
                    where=path,
                    expected=value,
                    got=_plain(own[key]),
                    todo=f"set model.backbone.architecture={path.parent}",
                )

    def build_heads(self, tasks: Mapping[str, Task], experts: Mapping[str, Checkpoint]) -> None:
        """Encodes every prompt once; experts have no heads of their own."""
        self.heads = {name: ZeroShotHead(self._class_embeddings(name, task)) for name, task in tasks.items()}

    def layout(self) -> Layout:
        """Returns the layout that ``open_clip.create_model("local-dir:...")`` reads."""
        config = {"model_cfg": self.model_config, "preprocess_cfg": self.preprocess_config}
        text = json.dumps(config, indent=2, sort_keys=True)
        folder = Path(self.architecture).expanduser()
        own = folder.is_dir() and self._text_config.get("hf_tokenizer_name")  # open_clip then looks for its files there
        copied = files_of(folder, TOKENIZER_FILES) if own else ()
        return Layout("open_clip_model.safetensors", {CONFIG: text}, copied)

    def preprocess(self, sample: Any) -> Tensor:
        """Returns a PIL image as uint8 ``(3, height, width)``: open_clip's transform up to the normalisation."""
        return self._transform(sample)

    def encode(self, inputs: Inputs, hidden: Sequence[float] = ()) -> Encoded:
        """Returns features of uint8 ``(samples, 3, height, width)``, not normalised, and the tower's hidden states."""
        assert isinstance(inputs, Tensor)
        images = self.normalise(inputs).to(self.network.logit_scale.dtype)
        if not hidden:
            return Encoded(self.network.encode_image(images))
        blocks = getattr(getattr(self.network.visual, "transformer", None), "resblocks", None)
        if blocks is None:
            raise ConfigError(
                f"'{self.architecture}' has no transformer as image tower, and so no hidden states to align"
            )
        with captured(list(blocks), hidden) as states:
            features = self.network.encode_image(images)
        return Encoded(features, tuple(states))

    def normalise(self, inputs: Tensor) -> Tensor:
        """Returns uint8 ``(samples, 3, height, width)`` as the fp32 images of open_clip's evaluation transform."""
        if self._mean.device != inputs.device:
            self._mean, self._std = self._mean.to(inputs.device), self._std.to(inputs.device)
        return inputs.to(torch.float32).div(255).sub(self._mean).div(self._std)

    @torch.no_grad()
    def _class_embeddings(self, name: str, task: Task) -> Tensor:
        scale: Tensor = self.network.logit_scale
        return scale.float().exp() * class_embeddings(
            name,
            task,
            lambda prompts: self.network.encode_text(self.tokenizer(list(prompts)).to(scale.device), normalize=True),
        )


def _tokenizer(identifier: str, text_config: Mapping[str, Any]) -> Any:
    """Returns the tokenizer of a text tower's configuration."""
    import open_clip

    if text_config.get("hf_tokenizer_name"):
        # transformers would ask at the terminal whether the folder's code may run
        return open_clip.get_tokenizer(identifier, trust_remote_code=False)
    return _own_tokenizer(identifier, json.dumps(text_config, sort_keys=True))


@lru_cache(maxsize=4)
def _own_tokenizer(identifier: str, text_config: str) -> Any:
    """Returns open_clip's own tokenizer, made once for each configuration: its merges take a quarter of a second."""
    import open_clip

    return open_clip.get_tokenizer(identifier)


@contextmanager
def _without_warning() -> Iterator[None]:
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(level)


def _architectures() -> list[str]:
    """Returns the names that open_clip knows, without importing it for that, which takes seconds."""
    if "open_clip" in sys.modules:  # somebody may have added to its own
        return list(sys.modules["open_clip"].list_models())
    spec = find_spec("open_clip")
    assert spec is not None and spec.origin is not None, "open_clip is a requirement of this package"
    return [path.stem for path in Path(spec.origin).parent.glob("model_configs/*.json")]


def _split_normalisation(config: dict[str, Any]) -> tuple[Callable[[Any], Tensor], Tensor, Tensor]:
    """Returns open_clip's transform with uint8 output, and the mean and deviation ``(3, 1, 1)`` that it would apply."""
    from open_clip.transform import PreprocessCfg, image_transform_v2
    from torchvision.transforms import Compose, Normalize, PILToTensor, ToTensor

    steps = image_transform_v2(PreprocessCfg(**config), is_train=False).transforms
    kept = [step for step in steps if not isinstance(step, ToTensor | Normalize)]
    normalise = next(step for step in steps if isinstance(step, Normalize))
    return (
        Compose([*kept, PILToTensor()]),
        torch.tensor(normalise.mean).view(3, 1, 1),
        torch.tensor(normalise.std).view(3, 1, 1),
    )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value
