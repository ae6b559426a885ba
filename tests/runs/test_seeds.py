"""Seeds: one number reaches all that a fit draws, whatever part has it, and the splits stay those of the pool."""

import copy

import pytest
import yaml
from running import METHODS, TASK_ARITHMETIC, fit_words, same_coefficients

from adamerge.runs.configuration import configurations
from adamerge.runs.fit import fit
from adamerge.runs.parser import as_data, read
from adamerge.runs.seeds import seed_all


def seeds(value, key="", found=None):
    """Every seed in a configuration, by its place."""
    found = {} if found is None else found
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        if "seed" in str(name):
            found[f"{key}{name}"] = item
        seeds(item, f"{key}{name}.", found)
    return found


@pytest.mark.parametrize(
    "method", ["atlas_ufm.yaml", "dare.yaml", "concrete_adamerging_layer_wise", "atlas_partition.yaml"]
)
def test_all_seeds_are_that_number_but_the_splits(method, pool_file):
    for stage in configurations([str(pool_file), str(METHODS / method), "--seed=7"]):
        found = seeds(as_data(read(stage)))
        assert found.pop("data.init_args.splits_seed") == 0 and found.pop("seed") is None
        assert set(found.values()) == {7} and len(found) >= 3, found


def test_without_it_nothing_changes(pool_file):
    (stage,) = configurations([str(pool_file), str(TASK_ARITHMETIC), "--data.seed=3"])
    found = seeds(as_data(read(stage)))
    assert found == {"seed_everything": 0, "seed": None, "data.init_args.seed": 3, "data.init_args.splits_seed": None}
    settings = read(stage)
    before = copy.deepcopy(as_data(settings))
    seed_all(settings)
    assert as_data(settings) == before


def test_splits_are_those_of_the_seed_that_the_data_had(pool_file):
    for words, kept in (["--data.seed=3"], 3), (["--data.seed=3", "--data.splits_seed=5"], 5):
        (stage,) = configurations([str(pool_file), str(TASK_ARITHMETIC), "--seed=7", *words])
        data = as_data(read(stage))["data"]["init_args"]
        assert (data["seed"], data["splits_seed"]) == (7, kept)


def test_a_run_keeps_the_seeds_that_it_was_given(pool_file):
    runs = {
        name: fit(fit_words(pool_file, "--name=n", f"--id={name}", f"--seed={seed}", "--model.search.lr=0.1", steps=2))
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    }
    assert same_coefficients(runs["a"], runs["b"]) and not same_coefficients(runs["a"], runs["c"])
    config = yaml.safe_load((runs["c"] / "config.yaml").read_text())
    assert (config["seed"], config["seed_everything"], config["data"]["init_args"]["seed"]) == (None, 2, 2)
