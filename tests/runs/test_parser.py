"""Configuration: whatever is wrong, the first line of the error names the key or the file, and the value."""

import pytest
import yaml
from conftest import CLASSES
from pico import pico_pool
from running import LAYER_WISE, TASK_ARITHMETIC, pool_config, write_yaml

from adamerge.errors import AdamergeError, CheckpointError, ConfigError
from adamerge.runs.command_line import told_apart
from adamerge.runs.instantiate import Configured
from adamerge.runs.parser import as_data, read_first
from adamerge.runs.preparation import prepared


@pytest.fixture
def pool_file(pool, image_folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_yaml(tmp_path / "pools" / "tiny.yaml", pool_config(pool, image_folders))


@pytest.fixture
def configured(pool_file):
    """The configuration of the pool, a method and further words."""
    return lambda *words: Configured.of(["--config", str(pool_file), "--config", str(LAYER_WISE), *map(str, words)])


@pytest.fixture
def refused(configured):
    """The error of further words; its first line says it all."""

    def refuse(*words) -> AdamergeError:
        with pytest.raises(AdamergeError) as found:
            configured(*words)
        error = found.value
        assert error.what == str(error).splitlines()[0] and len(error.what) < 500
        return error

    return refuse


def later(tmp_path, content: object) -> list[str]:
    """Words that add a configuration of this content, or of this text."""
    path = tmp_path / "later.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return ["--config", str(path)]


@pytest.mark.parametrize(
    ("words", "files"),
    [
        ([], []),
        (["--config", "a.yaml", "--model.search.lr=1", "--config", "b.yaml"], ["a.yaml", "b.yaml"]),
        (["--config=a.yaml", "--config=b.yaml", "--id=c"], ["a.yaml", "b.yaml"]),
        (["-c", "a.yaml", "--config", "b=c.yaml"], ["a.yaml", "b=c.yaml"]),
        (["--config=a=b.yaml"], ["a=b.yaml"]),
        (["--config", "a.yaml", "--config=b.yaml"], ["a.yaml", "b.yaml"]),
        (["--config=a.yaml", "--config", "b.yaml"], ["a.yaml", "b.yaml"]),
    ],
)
def test_the_files_of_a_command_line_in_order(words, files):
    assert told_apart(words).files == files


UNKNOWN = {
    "a word": (["--model.lrr=1"], None, "model.lrr", "'model.search.lr'"),
    "a word without its group": (["--lrr=1"], None, "lrr", "'model.search.lr'"),
    "a group in a file": ([], {"modell": {"lr": 1.0}}, "modell", "'model'"),
    "a key in a file": ([], {"model": {"lrr": 1.0}}, "lrr", "'model.search.lr'"),
    "a trainer's key in a file": ([], {"trainer": {"max_step": 3}}, "max_step", "'trainer.max_steps'"),
    "an argument of a class": ([], {"data": {"init_args": {"batch_sise": 3}}}, "batch_sise", "'data.batch_size'"),
    "another program's word": (["--model.learning_rate=1"], None, "model.learning_rate", "'model.search.lr'"),
    "a word of another group": (["--model.max_steps=1"], None, "model.max_steps", "'trainer.max_steps'"),
    "a mapping": (
        [],
        {"model": {"task_vectors": {"expert": {"a": "b"}}}},
        "task_vectors.expert",
        "'model.task_vectors.experts'",
    ),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_key_is_named_with_the_nearest(name, refused, tmp_path):
    words, content, key, near = UNKNOWN[name]
    error = refused(*words, *([] if content is None else later(tmp_path, content)))
    assert isinstance(error, ConfigError)
    assert key in error.what and f"did you mean {near}?" in error.what


@pytest.mark.parametrize(
    ("words", "content", "key"),
    [
        (["--zzzzz=1"], None, "zzzzz"),
        ([], {"model": {"lrr": 1.0}}, "lrr"),
        ([], {"data": {"init_args": {"batch_sise": 3}}}, "batch_sise"),
        ([], {"model": {"parametrization": {"init_args": {"chunk": 3}}}}, "chunk"),
    ],
)
def test_any_unknown_key_is_named(words, content, key, refused, tmp_path):
    assert key in refused(*words, *([] if content is None else later(tmp_path, content))).what


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.search.lr", "fast"),
        ("trainer.max_steps", "many"),
        ("trainer.max_steps", 2.5),
        ("data.init_args.batch_size", "lots"),
        ("data.init_args.transductive", "perhaps"),
        ("model.micro_batch", [1, 2]),
    ],
)
@pytest.mark.parametrize("how", ["word", "file"])
def test_a_value_of_a_wrong_type_is_shown_with_its_key(key, value, how, refused, tmp_path):
    content: object = value
    for part in reversed(key.split(".")):
        content = {part: content}
    error = refused(*([f"--{key}={value}"] if how == "word" else later(tmp_path, content)))
    assert isinstance(error, ConfigError)
    assert key.rpartition(".")[2] in error.what and str(value) in error.what


@pytest.mark.parametrize(
    ("key", "path"),
    [
        ("model.objective", "adamerge.objectives.Entrop"),
        ("model.objective", "gone.module.Objective"),
        ("model.parametrization", "adamerge.parametrizations.Layerwise"),
        ("data", "adamerge.data.Images"),
    ],
)
def test_an_unknown_class_is_named(key, path, refused, tmp_path):
    for words in ([f"--{key}={path}"], [f"--{key}.class_path={path}"]):
        assert path in refused(*words).what
    content: object = {"class_path": path}
    for part in reversed(key.split(".")):
        content = {part: content}
    assert path in refused(*later(tmp_path, content)).what


def test_an_unknown_class_in_a_list_is_named(refused, tmp_path):
    content = {"model": {"task_vectors": {"transforms": [{"class_path": "adamerge.transforms.Tie"}]}}}
    assert "adamerge.transforms.Tie'" in refused(*later(tmp_path, content)).what


@pytest.mark.parametrize(
    ("text", "got"), [("", "NoneType"), ("# a word\n", "NoneType"), ("- a\n", "list"), ("a", "str")]
)
def test_a_file_that_is_no_mapping_is_named(text, got, refused, tmp_path):
    error = refused(*later(tmp_path, text))
    assert str(tmp_path / "later.yaml") in error.what and error.got == got


@pytest.mark.parametrize(
    ("text", "line"),
    [("model:\n  lr: [1\n", 3), ("model:\n  lr: 1.0\n\tlr: 2\n", 3), ("a: b: c\n", 1), ("model: {\n", 2), ("a: *b", 1)],
)
def test_bad_yaml_names_file_and_line(text, line, refused, tmp_path):
    error = refused(*later(tmp_path, text))
    assert isinstance(error, ConfigError)
    assert error.what.startswith(f"{tmp_path / 'later.yaml'}: not valid YAML") and f"line {line}, " in error.what


def test_what_cannot_be_read_is_named(refused, tmp_path):
    gone = tmp_path / "gone.yaml"
    for words in (["--config", gone], [f"--config={gone}"], ["-c", gone]):
        assert refused(*words).what == f"no such configuration file: {gone}"
    assert str(tmp_path) in refused("--config", tmp_path).what
    (tmp_path / "later.yaml").write_bytes(b"model: \xff\xfe\n")
    assert str(tmp_path / "later.yaml") in refused("--config", tmp_path / "later.yaml").what
    assert "--config" in refused("--config").what


@pytest.mark.parametrize(
    ("words", "kind", "what"),
    [
        (["--data.init_args.batch_size=0"], ConfigError, "data: batch_size must be at least 1, got 0"),
        (["--data.batch_size=-3"], ConfigError, "data: batch_size must be at least 1, got -3"),
        (
            ["--data.init_args.calibration_samples=0"],
            ConfigError,
            "data: calibration_samples must be at least 1, got 0",
        ),
        (["--model.task_vectors.base=/gone/base"], CheckpointError, "base: '/gone/base': no such file or folder"),
    ],
)
def test_what_a_part_refuses_is_told_in_its_own_words(words, kind, what, refused):
    error = refused(*words)
    assert type(error) is kind and error.what == what


def test_what_a_part_of_a_part_refuses_is_told_in_its_own_words(refused, tmp_path):
    ties = {"class_path": "adamerge.transforms.Ties", "init_args": {"keep": 2.0}}
    error = refused(*later(tmp_path, {"model": {"task_vectors": {"transforms": [ties]}}}))
    assert error.what == "Ties: keep must be in (0, 1], got 2.0" and "0.2" in error.todo
    chunks = {"class_path": "adamerge.parametrizations.ChunkWise", "init_args": {"chunks": 0}}
    assert refused(*later(tmp_path, {"model": {"parametrization": chunks}})).what.startswith(
        "ChunkWise: chunks must be"
    )


def settings_of(*words: object) -> dict:
    return as_data(read_first([str(word) for word in words]))


def test_either_order_of_the_files_gives_the_same_settings(pool_file):
    pool_first = settings_of("--config", pool_file, "--config", LAYER_WISE)
    assert settings_of("--config", LAYER_WISE, "--config", pool_file) == pool_first
    assert settings_of(f"--config={LAYER_WISE}", "-c", pool_file) == pool_first
    assert pool_first["trainer"]["max_steps"] == 500 and pool_first["seed_everything"] == 0
    assert pool_first["model"]["parametrization"]["class_path"].endswith("LayerWise")
    assert pool_first["data"]["class_path"] == "adamerge.ImageCalibration"


def test_a_configuration_knows_nothing_of_one_that_was_read_before(pool_file):
    plain = ["--config", str(pool_file), "--config", str(TASK_ARITHMETIC)]
    other = ["--config", str(pool_file), "--config", str(LAYER_WISE), "--trainer.max_steps=7", "--model.micro_batch=2"]
    alone = as_data(read_first(plain))
    changed = read_first([*other, f"--tasks=[{next(iter(CLASSES))}]"])
    changed.model.task_vectors.init_args.experts.clear()
    changed.trainer.max_steps = 99
    assert as_data(read_first(plain)) == alone
    assert as_data(read_first(other))["trainer"]["max_steps"] == 7


def test_the_last_word_wins(pool_file, tmp_path):
    files = ["--config", pool_file, "--config", LAYER_WISE, *later(tmp_path, {"trainer": {"max_steps": 7}})]
    assert settings_of(*files)["trainer"]["max_steps"] == 7
    assert settings_of(*files, "--trainer.max_steps=8")["trainer"]["max_steps"] == 8
    assert settings_of("--config", pool_file, "--config", TASK_ARITHMETIC)["trainer"]["max_steps"] == -1


def test_a_trainer_that_lightning_refuses_is_told(configured):
    with pytest.raises(ConfigError, match="trainer: "):
        configured("--trainer.max_steps=3", "--trainer.val_check_interval=-1").trainer_with([])
    with pytest.raises(ConfigError, match="trainer: "):
        configured("--trainer.max_steps=3", "--trainer.accelerator=abacus").trainer_with([])


def test_some_of_a_pools_tasks(configured, refused, tmp_path):
    whole = configured()
    some = configured("--tasks=[shapes]")
    assert whole.model.merged.task_vectors.experts == tuple(whole.datamodule.tasks) == ("colours", "shapes")
    assert some.model.merged.task_vectors.experts == tuple(some.datamodule.tasks) == ("shapes",)
    both = configured(*later(tmp_path, {"tasks": ["shapes", "colours"]}))
    assert both.model.merged.task_vectors.experts == ("colours", "shapes"), "the pool's order"
    for words, missing in ((["--tasks=[shapes,shades]"], "'shades'"), (["--tasks=[]"], "none are named")):
        assert missing in refused(*words).what
    testbed = {"data": {"class_path": "adamerge.testbed.data.TestbedImages"}}
    assert "no tasks to choose from" in refused(*later(tmp_path, testbed), "--tasks=[shapes]").what


def test_a_vector_that_a_stage_has_solved_is_no_task_to_leave_out(pool_file, tmp_path):
    for source in ("{run}/1/task_vectors/merged.safetensors", str(tmp_path / "n/1/task_vectors/merged.safetensors")):
        solved = later(tmp_path, {"model": {"task_vectors": {"experts": {"wudi": source}}}})
        settings = settings_of("--config", pool_file, "--config", LAYER_WISE, *solved, "--tasks=[shapes]")
        assert list(settings["model"]["task_vectors"]["init_args"]["experts"]) == ["shapes", "wudi"]


def test_tasks_that_are_left_out_are_not_opened(pool, image_folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = pool_config(pool, image_folders)
    content["model"]["task_vectors"]["experts"]["far"] = "nowhere.safetensors"
    content["data"]["init_args"]["tasks"]["far"] = {"dataset": "nowhere", "vocabulary": "dtd"}
    words = ["--config", str(write_yaml(tmp_path / "p.yaml", content)), "--config", str(TASK_ARITHMETIC)]
    with pytest.raises(CheckpointError, match="nowhere"):
        Configured.of(words)
    assert Configured.of([*words, "--tasks=[colours]"]).model.merged.task_vectors.experts == ("colours",)


def test_some_of_a_pools_experts_are_left_out(configured, refused):
    assert configured("--leave_out=[shapes]").model.merged.task_vectors.experts == ("colours",)
    assert tuple(configured("--leave_out=[shapes]").datamodule.tasks) == ("colours", "shapes"), "their data stay"
    left = configured("--leave_out=[shapes]").settings
    assert left.leave_out is None, "a resumed run does not look for them"
    assert "no expert 'shades'" in refused("--leave_out=[shades]").what


@pytest.mark.parametrize("written", ["data: {labelled: true}", "data: {init_args: {labelled: true}}"])
def test_a_method_may_set_an_argument_of_whatever_data_there_are(written, pool, image_folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = str(write_yaml(tmp_path / "p.yaml", pool_config(pool, image_folders)))
    (tmp_path / "m.yaml").write_text(written)
    second, third = str(tmp_path / "m.yaml"), str(TASK_ARITHMETIC)
    for words in (
        ["--config", first, "--config", second, "--config", third],
        ["--config", second, f"--config={first}", "-c", third],
    ):
        assert Configured.of(words).datamodule.labelled is True


@pytest.mark.parametrize(("method", "outlined"), [(TASK_ARITHMETIC, True), (LAYER_WISE, False)])
def test_the_network_of_a_fit_has_weights_where_something_is_learned(method, outlined, tmp_path):
    pool = pico_pool("llama", tmp_path / "pool")
    backbone = {"class_path": "adamerge.CausalLM", "init_args": {"model": pool["base"]}}
    tasks = {task: {"dataset": "nowhere"} for task in pool["experts"]}
    data = {"class_path": "adamerge.LanguageCalibration", "init_args": {"tasks": tasks}}
    vectors = {"base": pool["base"], "experts": pool["experts"]}
    file = write_yaml(tmp_path / "p.yaml", {"model": {"backbone": backbone, "task_vectors": vectors}, "data": data})
    words = ["--config", str(file), "--config", str(method)]
    if outlined:
        assert prepared(read_first(words)).model.merged.backbone.outlined
    assert not Configured.of(words).model.merged.backbone.outlined, "others may run it"


def test_a_part_is_named_by_its_public_name_on_the_command_line_too(pool, image_folders, tmp_path):
    """A run's own configuration could not be read again."""
    file = write_yaml(tmp_path / "pool.yaml", pool_config(pool, image_folders))
    words = ["--config", str(file), "--config", str(LAYER_WISE)]
    with pytest.raises(ConfigError, match="no part 'adamerge.training.schedules.CosineDecay'") as caught:
        read_first([*words, "--model.search.schedule=adamerge.training.schedules.CosineDecay"])
    assert caught.value.todo == "name it adamerge.CosineDecay"
    assert read_first([*words, "--model.search.schedule=adamerge.CosineDecay"]).model.search.init_args.schedule
    assert read_first([*words, "--model.objective=adamerge.objectives.Entropy"]).model.objective  # a former name
