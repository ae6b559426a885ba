"""What an exported folder is made of: trunk and heads, for all tasks or for one, and the files beside them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lora_models import save_adapter, save_base
from pico import pico_pool
from running import command
from safetensors.torch import load_file

from adamerge import LayerWise, TaskVectors
from adamerge.artifacts.coefficients import Coefficients, load_coefficients, save_coefficients
from adamerge.artifacts.export import export
from adamerge.errors import CoefficientsError, ConfigError, ExportError
from adamerge.io.model_folder import Layout


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    return pico_pool("bert_mlm", tmp_path_factory.mktemp("bert"))


@pytest.fixture
def learned(pool, tmp_path):
    vectors = TaskVectors(pool["base"], pool["experts"], exclude=pool["exclude"])
    made = Coefficients(vectors, LayerWise(vectors, init=0.3), pool["backbone"]().layout())
    save_coefficients(made, tmp_path / "coefficients.safetensors")
    return tmp_path / "coefficients.safetensors"


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def is_trunk(name):
    return not name.startswith(("cls.", "classifier.", "bert.pooler."))


def test_without_a_task_the_heads_stand_beside_the_trunk(pool, learned, tmp_path):
    out = export(load_coefficients(learned), tmp_path / "out")
    base, found = weights(pool["base"]), weights(out)
    assert found.keys() == base.keys()
    experts = {task: weights(place) for task, place in pool["experts"].items()}
    for name, value in found.items():
        update = (
            sum(0.3 * (expert[name].double() - base[name].double()) for expert in experts.values())
            if is_trunk(name)
            else 0
        )
        assert torch.allclose(value.double(), base[name].double() + update, atol=1e-6), name
    for task, expert in experts.items():
        head = weights(out / "heads" / task)
        assert head.keys() == {name for name in expert if not is_trunk(name)}
        assert all(torch.equal(value, expert[name]) for name, value in head.items())
        config = json.loads((out / "heads" / task / "config.json").read_text())
        assert len(config["id2label"]) == {"one": 3, "two": 4}[task]


def test_for_a_task_the_model_is_complete(pool, learned, tmp_path, capfd):
    merged = weights(export(load_coefficients(learned), tmp_path / "all"))
    outcome = command(capfd, "export", learned, tmp_path / "out", "--task", "two", "--dtype", "bfloat16")
    assert outcome.code == 0, outcome.err
    expert, found = weights(pool["experts"]["two"]), weights(tmp_path / "out")
    assert found.keys() == expert.keys()
    for name, value in found.items():
        assert torch.equal(value, (merged if is_trunk(name) else expert)[name].to(torch.bfloat16)), name
    assert not (tmp_path / "out" / "heads").exists()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    given = json.loads((Path(pool["experts"]["two"]) / "config.json").read_text())
    assert config == given | {"dtype": "bfloat16"}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (Path(pool["base"]) / name).read_bytes()


def test_nested_configurations_get_the_dtype_too(tmp_path):
    pool = pico_pool("llava", tmp_path / "pool")
    file = Path(pool["base"]) / "config.json"
    config = json.loads(file.read_text())
    config["text_config"]["dtype"], config["vision_config"]["torch_dtype"] = "float32", "float16"
    file.write_text(json.dumps(config))
    vectors = TaskVectors(pool["base"], pool["experts"], include=pool["include"])
    made = Coefficients(vectors, LayerWise(vectors), Layout(copied=["config.json"]), dtype=torch.bfloat16)
    found = json.loads((export(made, tmp_path / "out") / "config.json").read_text())
    assert found["dtype"] == found["text_config"]["dtype"] == found["vision_config"]["torch_dtype"] == "bfloat16"


def test_a_task_that_is_none_or_has_no_head_is_refused(pool, learned, tmp_path):
    made = load_coefficients(learned)
    with pytest.raises(ConfigError, match="no task 'three'"):
        export(made, tmp_path / "out", task="three")
    with pytest.raises(ConfigError, match="'one' has no head of its own"):
        export(replace(made, layout=Layout()), tmp_path / "out", task="one")
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_gone_is_missed(pool, learned, tmp_path):
    made = load_coefficients(learned)
    with pytest.raises(ExportError, match="has no 'gone.json'"):
        export(replace(made, layout=replace(made.layout, copied=["gone.json"])), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["../x", "a/b", "", "..", "/etc/passwd"])
def test_unsafe_names_are_refused(pool, learned, tmp_path, name):
    made = load_coefficients(learned)
    with pytest.raises(CoefficientsError, match="unsafe file"):
        export(replace(made, layout=replace(made.layout, copied=[name])), tmp_path / "out")
    experts = {name: pool["experts"]["one"]}
    vectors = TaskVectors(pool["base"], experts, exclude=pool["exclude"])
    with pytest.raises(CoefficientsError, match="unsafe file"):
        export(Coefficients(vectors, LayerWise(vectors), made.layout), tmp_path / "out")


def test_the_layout_is_kept_in_the_coefficient_file(pool, learned):
    layout = pool["backbone"]().layout()
    assert layout.copied and layout.heads
    assert load_coefficients(learned).layout == layout


def test_an_adapters_head_needs_the_configuration_that_it_belongs_to(tmp_path):
    """Else the base's would be written, of whose classes the head is not."""
    base = save_base("bert", tmp_path / "base")
    save_adapter("bert", tmp_path / "a", r=2, target_modules=["query"], modules_to_save=["classifier"])
    vectors = TaskVectors(base, {"a": tmp_path / "a"}, exclude=["classifier.*"])
    layout = Layout(copied=["config.json"], heads=["classifier.*"])
    made = Coefficients(vectors, LayerWise(vectors), layout)
    with pytest.raises(
        ConfigError, match="expert 'a' is an adapter, and which model its head belongs to is written nowhere"
    ):
        export(made, tmp_path / "out", task="a")
    config = json.loads((base / "config.json").read_text()) | {"id2label": {"0": "x", "1": "y", "2": "z"}}
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    export(made, tmp_path / "out", task="a")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["id2label"]["0"] == "x"
