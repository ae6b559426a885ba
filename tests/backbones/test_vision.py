"""Image towers of transformers: inputs are the processors' own, features the networks'."""

import pytest
import torch
import transformers
from pico import TASKS, pico_pool, pictures

from adamerge import LayerWise, MergedModel, TaskVectors
from adamerge.backbones import ClipVisionClassifier
from adamerge.backbones.vision import Images
from adamerge.errors import CheckpointError

PROCESSORS = {
    "clip": transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
    "vit": transformers.ViTImageProcessor(size={"height": 16, "width": 16}),
    "no normalisation": transformers.ViTImageProcessor(size={"height": 16, "width": 16}, do_normalize=False),
    "no scaling": transformers.ViTImageProcessor(size={"height": 16, "width": 16}, do_rescale=False),
}


@pytest.mark.parametrize("kind", PROCESSORS)
def test_the_two_halves_of_a_processor_are_the_whole(kind):
    images = Images(PROCESSORS[kind])
    assert images.compact == (kind != "no scaling")
    for image in (*pictures(), pictures()[0].convert("L"), pictures()[0].convert("RGBA")):
        pixels = images(image)
        assert pixels.dtype == (torch.uint8 if images.compact else torch.float32)
        own = PROCESSORS[kind](images=image.convert("RGB"), return_tensors="pt")["pixel_values"]
        assert torch.allclose(images.normalise(pixels[None]), own.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_filled_with_an_expert_it_is_that_expert(kind, tmp_path):
    pool = pico_pool(kind, tmp_path)
    backbone = pool["backbone"]()
    vectors = TaskVectors(pool["base"], pool["experts"], exclude=pool["exclude"])
    merged = MergedModel(backbone, vectors, LayerWise(vectors, init=0.3))
    backbone.build_heads(TASKS, vectors.checkpoints)
    inputs = torch.stack([backbone.preprocess(image) for image in pictures()])
    for task, classes in (("one", 3), ("two", 4)):
        merged.fill_expert(task)
        expert = transformers.AutoModelForImageClassification.from_pretrained(pool["experts"][task]).eval()
        with torch.no_grad():
            encoded = merged(inputs, [0, -1])
            logits = backbone.output(encoded, task).logits
            own = expert(pixel_values=backbone.images.normalise(inputs), output_hidden_states=True)
        assert logits.shape == (3, classes)
        assert torch.allclose(logits, own.logits, atol=1e-6)
        assert all(state.ndim == 3 for state in encoded.hidden)
    merged.merge()  # and the statistics are the base's again
    base = TaskVectors(pool["base"], pool["experts"], exclude=pool["exclude"]).base
    for name, tensor in backbone.tensors().items():
        assert name in vectors or torch.equal(tensor, base[name])


def test_statistics_cannot_be_merged_by_gradients(tmp_path):
    pool = pico_pool("resnet", tmp_path)
    vectors = TaskVectors(pool["base"], pool["experts"], exclude=["classifier.*"])
    with pytest.raises(CheckpointError, match="is a buffer, not a parameter"):
        MergedModel(pool["backbone"](), vectors, LayerWise(vectors))


def test_clip_is_the_formula_of_its_paper(tmp_path):
    pool = pico_pool("clip", tmp_path)
    backbone = pool["backbone"]()
    backbone.build_heads(TASKS, {})
    network = transformers.CLIPModel.from_pretrained(pool["base"]).eval()
    inputs = torch.stack([backbone.preprocess(image) for image in pictures()])
    for name, task in TASKS.items():
        rows = []
        with torch.no_grad():
            for word in task.classnames:
                tokens = backbone.tokenizer(
                    [template.format(word) for template in task.templates], padding=True, return_tensors="pt"
                )
                given = {key: tokens[key] for key in ("input_ids", "attention_mask")}
                text = network.text_projection(network.text_model(**given).pooler_output).double()
                mean = (text / text.norm(dim=-1, keepdim=True)).mean(dim=0)
                rows.append(mean / mean.norm())
            pixels = backbone.images.normalise(inputs)
            image = network.visual_projection(network.vision_model(pixel_values=pixels).pooler_output).double()
            found = backbone.output(backbone.encode(inputs), name).logits
        scale = network.logit_scale.detach().double().exp()
        expected = scale * (image / image.norm(dim=-1, keepdim=True)) @ torch.stack(rows).T
        assert (found.double() - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))
    assert backbone.trains("vision_model.post_layernorm.weight") and not backbone.trains("logit_scale")


def test_only_clip_is_clip(tmp_path):
    with pytest.raises(CheckpointError):
        ClipVisionClassifier(pico_pool("vit", tmp_path)["base"])
