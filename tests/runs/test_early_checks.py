"""Parts that open nothing: made from one typed parse, and refused before a library of networks or data is loaded."""

import sys

import pytest
from jsonargparse import Namespace
from running import ROOT, TASK_ARITHMETIC, child, pool_config, write_yaml

from adamerge.errors import AdamergeError, ConfigError
from adamerge.objectives import Entropy
from adamerge.parametrizations import Concrete, HardMask, LayerWise
from adamerge.parametrizations.constraints import Projection
from adamerge.runs.early_checks import arguments_made, checked_parts, made, made_subclass
from adamerge.runs.parser import read_first
from adamerge.task_vectors.storage import Resident, Storage
from adamerge.task_vectors.task_vectors import TaskVectors
from adamerge.training import Bilevel, Descent
from adamerge.training.merging import Method
from adamerge.transforms import Ties

LEARNED = {"parametrization": {"class_path": "LayerWise"}, "objective": {"class_path": "Entropy"}}


@pytest.fixture
def parts(pool, image_folders, tmp_path, monkeypatch):
    """The parts of a pool with a method, and further words."""
    monkeypatch.chdir(tmp_path)
    write_yaml(tmp_path / "pool.yaml", pool_config(pool, image_folders))
    write_yaml(tmp_path / "method.yaml", {"model": LEARNED, "trainer": {"max_steps": 3}})
    return lambda *words: checked_parts(read_first(["pool.yaml", "method.yaml", *words]))


def test_a_method_and_its_data_are_made(parts):
    found = parts("--model.storage=Resident", "--model.storage.dtype=bfloat16", "--data.batch_size=3")
    method, data = found.method, found.data
    assert isinstance(method.objective, Entropy) and isinstance(method.search, Descent) and method.search.lr == 1e-3
    assert isinstance(method.storage, Resident) and method.storage.dtype == "bfloat16"
    assert data.batch_size == 3 and list(data.sources) == ["colours", "shapes"]


def test_parametrizations_wait_for_their_task_vectors_also_inside(parts, pool):
    inner = "{class_path: LayerWise, init_args: {init: 0.4, constraint: {class_path: Projection}}}"
    words = ["--model.parametrization=Concrete", f"--model.parametrization.inner={inner}"]
    factory = parts(*words, "--model.parametrization.mask=HardMask", "--model.search=Bilevel").method.parametrization
    built = factory(TaskVectors(pool["base"], pool["experts"], include=pool["include"]))
    assert isinstance(built, Concrete) and isinstance(built.mask, HardMask) and isinstance(built.inner, LayerWise)
    assert built.inner.init == 0.4 and isinstance(built.inner.constraint, Projection)


def test_the_search_takes_its_own_arguments(parts):
    words = ["--model.parametrization=Concrete", "--model.parametrization.inner=LayerWise", "--model.search=Bilevel"]
    search = parts(*words, "--model.search.inner_lr=0.5", "--model.search.lr=1e-2").method.search
    assert isinstance(search, Bilevel) and (search.inner_lr, search.lr) == (0.5, 0.01)


def test_arguments_are_made_and_the_class_is_not(parts):
    settings = read_first(["pool.yaml", "method.yaml", "--model.task_vectors.transforms=[{class_path: Ties}]"])
    given = arguments_made(TaskVectors, settings.model.task_vectors.init_args)
    assert isinstance(given["transforms"][0], Ties) and given["experts"].keys() == {"colours", "shapes"}
    spec = Namespace(class_path="adamerge.Resident", init_args=Namespace(dtype="float16"))
    assert made_subclass(Storage, spec).dtype == "float16"
    with pytest.raises(ConfigError, match="no dtype 'int3'"):
        made_subclass(Storage, Namespace(class_path="adamerge.Resident", init_args=Namespace(dtype="int3")))
    with pytest.raises(ConfigError, match="micro_batch must be at least 1"):
        made(Method, Namespace(parametrization=settings.model.parametrization, micro_batch=0))


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--model.objective=CrossEntropy"], "CrossEntropy needs labels"),
        (["--model.task_weights.shape=2"], "model.task_weights: the data have no task 'shape'; did you mean 'shapes'?"),
        (["--data=null"], "model.objective=Entropy needs data, and there are none"),
        (["--data.tasks.colours.dataset=./gone"], "task 'colours': there is no folder ./gone"),
        (["--model.backbone.architecture=ViT-B-33"], "model.backbone.architecture: 'ViT-B-33' is neither a folder nor"),
        (["--model.init_from=gone"], "model.init_from: '"),
        (["--trainer.max_steps=0"], "trainer.max_steps is not set"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(words, what, parts):
    with pytest.raises(AdamergeError) as found:
        parts(*words)
    assert found.value.what.startswith(what)


def test_of_a_method_that_learns_nothing_data_are_not_looked_at(parts):
    words = ["--model.objective=null", "--data.tasks.colours.dataset=./gone", "--trainer.max_steps=-1"]
    assert parts(*words).method.objective is None


@pytest.mark.slow
def test_reading_and_checking_load_no_library_of_training_or_networks():
    """A refused fit takes little more than torch does to import; so does a check, which counts rows by their own library."""
    script = (
        "import sys; from adamerge.cli import main\n"
        "heavy = {'lightning', 'torchmetrics', 'datasets', 'open_clip', 'transformers', 'torchvision', 'scipy'}\n"
        "for words in (['fit', '--model.search.lr=-1'], ['check']):\n"
        "    print('loaded', main([words[0], *sys.argv[1:], *words[1:]]), sorted(heavy & set(sys.modules)))"
    )
    for pool in ("images", "text", "causal"):
        words = ["configs/pools/testbed_" + pool + ".yaml", "configs/methods/adamerging_layer_wise.yaml"]
        done = child(["-c", script, *words], ROOT)
        loaded = [line for line in done.stdout.splitlines() if line.startswith("loaded")]
        assert loaded == ["loaded 2 []", "loaded 0 ['datasets']"], done.stderr[-2000:]
    assert TASK_ARITHMETIC.is_file() and "lightning" in sys.modules
