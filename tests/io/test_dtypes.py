"""Dtypes: each that torch and the format share has one name in each, and configurations name three."""

import pytest
import torch
from safetensors.torch import save_file

from adamerge.errors import ConfigError
from adamerge.io.dtypes import FLOATS, FORMAT_NAMES, TORCH_DTYPES, name_of, torch_dtype
from adamerge.io.safetensors_file import TensorFile


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint16, torch.bool, torch.complex64], ids=str
)
def test_names_are_those_that_the_library_writes(tmp_path, dtype):
    save_file({"x": torch.zeros(2).to(dtype)}, tmp_path / "x.safetensors")
    written = TensorFile(tmp_path / "x.safetensors").tensors["x"].dtype
    assert FORMAT_NAMES[dtype] == written and TORCH_DTYPES[written] == dtype


def test_no_two_names_are_one_dtype():
    assert len(FORMAT_NAMES) == len(TORCH_DTYPES)


@pytest.mark.parametrize("name", FLOATS)
def test_what_a_configuration_names_is_the_dtype_of_that_name(name):
    assert name_of(torch_dtype(name, "storage")) == name


@pytest.mark.parametrize("name", ["float64", "int8", "fp32", "", "nn"])
def test_another_name_is_refused_with_those_that_there_are(name):
    with pytest.raises(ConfigError, match=f"backbone: there is no dtype '{name}'") as refused:
        torch_dtype(name, "backbone")
    assert refused.value.expected == "one of ['float32', 'bfloat16', 'float16']"
