"""Memory: sizes from headers alone, and what the system says is left."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from adamerge.deltas.quantized import Floats
from adamerge.task_vectors import memory
from adamerge.task_vectors.memory import Available, Memory, Sizes
from adamerge.task_vectors.task_vectors import TaskVectors
from adamerge.transforms import Combine, Magnitude, Scale, Ties

CPU = torch.device("cpu")


def written(folder, **dtypes):
    for name, dtype in dtypes.items():
        weights = {"a.weight": torch.randn(6, 4).to(dtype), "a.bias": torch.randn(4).to(dtype)}
        save_file({**weights, "steps": torch.tensor(3)}, folder / f"{name}.safetensors")
    return folder / "base.safetensors", {n: folder / f"{n}.safetensors" for n in dtypes if n != "base"}


def with_adapter(folder, rank=2):
    (folder / "lora").mkdir()
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 1}
    (folder / "lora" / "adapter_config.json").write_text(json.dumps(config))
    factors = {"lora_A": torch.randn(rank, 4), "lora_B": torch.randn(6, rank)}
    named = {f"base_model.model.a.{key}.weight": value for key, value in factors.items()}
    save_file(named, folder / "lora" / "adapter_model.safetensors")
    return folder / "lora"


def test_sizes_by_hand(tmp_path):
    base, experts = written(tmp_path, base=torch.bfloat16, one=torch.float32, two=torch.bfloat16, three=torch.float32)
    found = Sizes.of(TaskVectors(base, experts))
    assert found.experts == 3 and found.tensors == {"a.bias": 4, "a.weight": 24}
    assert found.dense == {"a.bias": 12, "a.weight": 72} and found.factors == 0
    assert found.base_bytes == 2 * 28 and found.narrow and not found.transformed
    assert (found.merged, found.largest) == (28, 24)
    assert found.dense_bytes(Floats(torch.float16)) == 2 * (12 + 72) and found.transform_bytes(24) == 0
    assert found.base_memory(CPU) == Memory() and found.base_memory(torch.device("cuda")) == Memory(device=2 * 28)
    transformed = Sizes.of(TaskVectors(base, experts, transforms=[Ties(keep=0.5)]))
    assert transformed.transform_bytes(24) == 4 * (3 * 3 * 24 - 28) and transformed.transform_bytes(1) == 0
    held = {name: torch.randn(3) for name in ("a", "b")}
    assert not Sizes.of(TaskVectors(held, {"one": held})).narrow


def test_sizes_of_factors_stay_those_of_factors(tmp_path):
    base, experts = written(tmp_path, base=torch.float32, full=torch.float32)
    adapter = with_adapter(tmp_path)
    mixed = Sizes.of(TaskVectors(base, {**experts, "lora": adapter}))
    # the adapter leaves the bias alone: factors of rank 0
    assert mixed.dense == {"a.bias": 4, "a.weight": 24} and mixed.factors == 2 * (6 + 4)
    alone = TaskVectors(base, {"lora": adapter})
    assert Sizes.of(alone).dense == {"a.weight": 0} and Sizes.of(alone).factors == 20
    scaled = TaskVectors(base, {"lora": adapter}, [Scale({"lora": -1.0})])
    assert Sizes.of(scaled).factors == 20
    pruned = Sizes.of(TaskVectors(base, {"lora": adapter}, [Magnitude()]))
    assert pruned.factors == 0 and pruned.dense == {"a.weight": 24} and pruned.transformed
    summed = TaskVectors(base, {**experts, "lora": adapter}, [Combine({"sum": {"full": 1.0, "lora": 1.0}})])
    assert Sizes.of(summed).dense == {"a.bias": 4, "a.weight": 24} and Sizes.of(summed).experts == 1


def test_sizes_read_no_weight_and_learn_nothing(tmp_path, monkeypatch):
    from adamerge.io.safetensors_file import TensorFile

    base, experts = written(tmp_path, base=torch.float32, one=torch.float32, two=torch.float32)
    vectors = TaskVectors(base, {**experts, "lora": with_adapter(tmp_path)}, [Ties(), Scale()])
    monkeypatch.setattr(TensorFile, "read", lambda self, name: pytest.fail(f"read {name}"))
    assert Sizes.of(vectors).dense == {"a.bias": 12, "a.weight": 72}
    assert vectors._states is None


def test_memory_fits_with_a_margin_and_where_nothing_is_known():
    need = Memory(host=100, device=50) + Memory.of(20, CPU) + Memory.of(30, torch.device("cuda"))
    assert need == Memory(120, 80)
    assert need.fits(Available(150, 100), 0.2) and not need.fits(Available(149, 100), 0.2)
    assert not need.fits(Available(150, 99), 0.2) and need.fits(Available(None, None), 0.2)


def test_this_machine_has_memory():
    found = Available.on(CPU)
    assert found.host is None or 1 << 20 < found.host < 1 << 50
    assert found.device == 0


@pytest.fixture
def system(tmp_path):
    """A machine with 8 GiB available, and a process in a control group below another."""
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal:  16777216 kB\nMemFree:  1 kB\nMemAvailable:    8388608 kB\n")
    (groups / "pod" / "job").mkdir(parents=True)
    return proc, groups


def test_the_hosts_available_memory_is_what_the_kernel_says(system):
    assert memory._free_host(system[0]) == 8 << 30
    assert memory._free_host(system[0] / "self") is None


def test_the_tightest_group_around_decides_and_caches_can_be_dropped(system):
    proc, groups = system
    (proc / "self" / "cgroup").write_text("0::/pod/job\n")
    assert memory._free_group(proc, groups) is None
    (groups / "pod" / "job" / "memory.max").write_text("max\n")
    (groups / "pod" / "job" / "memory.current").write_text("5\n")
    assert memory._free_group(proc, groups) is None
    (groups / "pod" / "memory.max").write_text(f"{4 << 30}\n")
    (groups / "pod" / "memory.current").write_text(f"{3 << 30}\n")
    assert memory._free_group(proc, groups) == 1 << 30
    (groups / "pod" / "memory.stat").write_text(f"anon 7\ninactive_file {1 << 30}\nactive_file {1 << 29}\n")
    assert memory._free_group(proc, groups) == (1 << 30) + (1 << 30) + (1 << 29)
    (groups / "memory.max").write_text(f"{1 << 28}\n")
    (groups / "memory.current").write_text(f"{1 << 30}\n")
    assert memory._free_group(proc, groups) == 0


def test_groups_of_the_first_version_are_found_too(system):
    proc, groups = system
    (proc / "self" / "cgroup").write_text("5:cpu,cpuacct:/pod\n3:memory:/pod\n1:name=systemd:/x\n")
    (groups / "memory" / "pod").mkdir(parents=True)
    (groups / "memory" / "pod" / "memory.limit_in_bytes").write_text("1000\n")
    (groups / "memory" / "pod" / "memory.usage_in_bytes").write_text("700\n")
    (groups / "memory" / "pod" / "memory.stat").write_text("total_inactive_file 100\n")
    assert memory._free_group(proc, groups) == 400


def test_processes_on_one_machine_share(system, monkeypatch):
    proc, groups = system
    monkeypatch.setattr(memory, "PROC", proc)
    monkeypatch.setattr(memory, "CGROUPS", groups)
    assert Available.on(CPU).host == 8 << 30
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert Available.on(CPU).host == 2 << 30
    assert Available.on(CPU, local_world_size=8).host == 1 << 30
