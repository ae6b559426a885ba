"""The open_clip classifier: names, inputs and heads are open_clip's own, and the network never leaves eval mode."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from adamerge.backbones import Encoded, OpenClipClassifier
from adamerge.checkpoints.opening import open_checkpoint
from adamerge.errors import CheckpointError, ConfigError, DataError
from adamerge.merging.merged_model import MergedModel
from adamerge.parametrizations import LayerWise
from adamerge.task_vectors.task_vectors import TaskVectors

TASKS = {
    "colours": SimpleNamespace(classnames=["red", "green", "blue"], templates=["a {} thing.", "{}", "one {}"]),
    "shapes": SimpleNamespace(classnames=["circle", "star"], templates=["a {}"]),
}


@pytest.fixture(scope="module")
def backbone(pool):
    found = OpenClipClassifier(pool["base"])
    found.network.load_state_dict(load_file(Path(pool["base"]) / "open_clip_model.safetensors"))
    return found


@pytest.fixture(scope="module")
def reference(pool):
    return open_clip.create_model(f"local-dir:{pool['base']}", require_pretrained=True).eval()


def pictures(count=4, size=(16, 16)):
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)) for _ in range(count)]


def test_tensors_are_the_state_dict_and_share_its_storage(backbone, pool):
    weights = load_file(Path(pool["base"]) / "open_clip_model.safetensors")
    assert backbone.tensors().keys() == weights.keys()
    for name, tensor in backbone.tensors().items():
        assert torch.equal(tensor, weights[name])
    storages = [tensor.data_ptr() for tensor in backbone.tensors().values()]
    assert len(set(storages)) == len(storages)  # one name per storage
    parameters = dict(backbone.network.named_parameters())
    assert all(backbone.tensors()[name] is parameter for name, parameter in parameters.items())


@pytest.mark.parametrize("size", [(16, 16), (40, 23), (9, 31)])
def test_inputs_are_open_clips_own_transform_bit_for_bit(backbone, reference, pool, size):
    _, _, transform = open_clip.create_model_and_transforms(f"local-dir:{pool['base']}")
    images = [backbone.preprocess(picture) for picture in pictures(size=size)]
    assert all(image.dtype == torch.uint8 and image.shape == (3, 16, 16) for image in images)
    seen = []
    handle = backbone.network.visual.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        features = backbone.encode(torch.stack(images)).features
        theirs = torch.stack([transform(picture) for picture in pictures(size=size)])
        expected = reference.encode_image(theirs)
    handle.remove()
    assert torch.equal(seen[0], theirs)
    assert torch.equal(features, expected)


def test_grey_and_transparent_pictures_are_pictures(backbone):
    for mode in ("L", "RGBA", "P", "1"):
        assert backbone.preprocess(pictures(1)[0].convert(mode)).shape == (3, 16, 16)


def test_heads_are_the_zero_shot_classifier_of_the_paper(backbone, reference, pool):
    backbone.build_heads(TASKS, {})
    tokenizer = open_clip.get_tokenizer(f"local-dir:{pool['base']}")
    features = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    for name, task in TASKS.items():
        rows = []
        with torch.no_grad():
            for classname in task.classnames:
                tokens = tokenizer([template.format(classname) for template in task.templates])
                text = reference.encode_text(tokens).double()
                mean = (text / text.norm(dim=-1, keepdim=True)).mean(dim=0)
                rows.append(mean / mean.norm())
        scale = reference.logit_scale.detach().double().exp()
        images = features.double() / features.double().norm(dim=-1, keepdim=True)
        expected = scale * images @ torch.stack(rows).T
        output = backbone.output(Encoded(features), name)
        assert output.features is features
        assert (output.logits.double() - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))
        assert not any(True for _ in backbone.heads[name].parameters())
        assert not output.logits.requires_grad


def test_many_prompts_are_encoded_in_parts_without_a_difference(backbone):
    names = [f"thing {i}" for i in range(130)]
    backbone.build_heads({"many": SimpleNamespace(classnames=names, templates=["a {}", "the {}", "{}"])}, {})
    whole = backbone.heads["many"].weight
    backbone.build_heads({"few": SimpleNamespace(classnames=names[100:], templates=["a {}", "the {}", "{}"])}, {})
    assert whole.shape == (130, 16)
    assert torch.allclose(backbone.heads["few"].weight, whole[100:], atol=1e-5)


@pytest.mark.parametrize("words", [([], ["a {}"]), (["red"], [])])
def test_a_head_needs_classes_and_templates(backbone, words):
    with pytest.raises(DataError, match="task 'empty'"):
        backbone.build_heads({"empty": SimpleNamespace(classnames=words[0], templates=words[1])}, {})


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("quick_gelu", lambda config: config["model_cfg"].update(quick_gelu=True)),
        ("mean", lambda config: config["preprocess_cfg"].update(mean=[0.5, 0.5, 0.5])),
        ("resize_mode", lambda config: config["preprocess_cfg"].update(resize_mode="squash")),
        (None, lambda config: config.update(other=1)),
    ],
)
def test_a_base_whose_configuration_says_otherwise_is_refused(key, change, pool, tmp_path):
    """What decides what its weights compute is in none of them."""
    backbone = OpenClipClassifier(pool["base"])
    config = {"model_cfg": dict(backbone.model_config), "preprocess_cfg": dict(backbone.preprocess_config)}
    change(config)
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    shutil.copy(Path(pool["base"]) / "open_clip_model.safetensors", tmp_path)
    base = open_checkpoint(tmp_path)
    if key is None:
        backbone.check_base(base)
        return
    with pytest.raises(CheckpointError, match=f"its {key} is not that of the base"):
        backbone.check_base(base)
    vectors = TaskVectors(tmp_path, pool["experts"], include=pool["include"])
    with pytest.raises(CheckpointError, match=f"its {key} is not that of the base"):
        MergedModel(backbone, vectors, LayerWise(vectors))


def test_the_layout_is_read_by_open_clip(backbone, pool):
    layout = backbone.layout()
    assert layout.weights == "open_clip_model.safetensors"
    config = json.loads(layout.files["open_clip_config.json"])
    given = json.loads((Path(pool["base"]) / "open_clip_config.json").read_text())
    assert config["model_cfg"] == given["model_cfg"]
    assert given["preprocess_cfg"].items() <= {**config["preprocess_cfg"]}.items() or all(
        list(config["preprocess_cfg"][key]) == list(value) for key, value in given["preprocess_cfg"].items()
    )


def test_half_precision_networks_take_the_same_inputs(pool):
    backbone = OpenClipClassifier(pool["base"], dtype="bfloat16")
    assert {t.dtype for t in backbone.tensors().values()} == {torch.bfloat16}
    features = backbone.encode(torch.zeros(2, 3, 16, 16, dtype=torch.uint8)).features
    assert features.dtype == torch.bfloat16 and torch.isfinite(features).all()
    backbone.build_heads({"shapes": TASKS["shapes"]}, {})
    assert torch.isfinite(backbone.output(Encoded(features.float()), "shapes").logits).all()
    with torch.no_grad():
        assert backbone.output(Encoded(features), "shapes").logits.shape == (2, 2)


def test_the_network_is_in_eval_mode_and_open_to_gradients(pool):
    backbone = OpenClipClassifier(pool["base"])
    assert not any(module.training for module in backbone.network.modules())
    backbone.encode(torch.zeros(1, 3, 16, 16, dtype=torch.uint8)).features.sum().backward()
    assert backbone.tensors()["visual.conv1.weight"].grad is not None


def test_an_unknown_architecture_says_where_the_names_are():
    with pytest.raises(ConfigError, match="'ViT-Q-1' is neither a folder nor a model") as found:
        OpenClipClassifier("ViT-Q-1")
    assert "list_models" in found.value.todo


@pytest.mark.parametrize(
    "config",
    [None, "[]", "{}", '{"model_cfg": 5}', '{"model_cfg": {}}', '{"model_cfg": {"embed_dim": 16, "nonsense": 1}}'],
)  # fmt: skip
def test_an_unusable_folder_is_a_checkpoint_error(tmp_path, config):
    if config is not None:
        (tmp_path / "open_clip_config.json").write_text(config)
    with pytest.raises(CheckpointError):
        OpenClipClassifier(str(tmp_path))
