"""A file in several sessions: what reads back is taken over, all else is written again; the target is whole or not there."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from adamerge.errors import ExportError
from adamerge.io.resumable_file import ResumableFile

FLOAT, HALF = torch.float32, torch.bfloat16
HEADER = {"a": (FLOAT, torch.Size([3, 2])), "b": (HALF, torch.Size([5])), "c": (FLOAT, torch.Size([]))}
METADATA = {"made": "by hand"}


def values():
    torch.manual_seed(0)
    return {name: torch.randn(shape).to(dtype) for name, (dtype, shape) in HEADER.items()}


def begun(target, count, metadata=METADATA):
    """A session that writes so many tensors and ends."""
    with ResumableFile(target, HEADER, metadata) as file:
        before = file.done
        for name in list(HEADER)[before : before + count]:
            file.add(values()[name])
        return before


def finished(target, metadata=METADATA):
    with ResumableFile(target, HEADER, metadata) as file:
        before = file.done
        for name in list(HEADER)[before:]:
            file.add(values()[name])
        file.finish()
    return before


@pytest.mark.parametrize("sessions", [[], [1], [2], [3], [1, 1], [0, 1, 0]])
def test_any_sessions_give_the_same_bytes(sessions, tmp_path):
    finished(tmp_path / "at once")
    target = tmp_path / "deep" / "er" / "file"
    for count in sessions:
        begun(target, count)
        assert not target.exists()
    assert finished(target) == sum(sessions)
    assert target.read_bytes() == (tmp_path / "at once").read_bytes()
    assert [path.name for path in target.parent.iterdir()] == ["file"]
    with safe_open(target, "pt") as file:
        assert file.metadata() == METADATA
    for name, value in load_file(target).items():
        assert torch.equal(value, values()[name]) and value.dtype == HEADER[name][0]


def test_what_is_written_can_be_read_at_any_time_and_the_rest_is_not_there(tmp_path):
    target = tmp_path / "file"
    begun(target, 1)
    with ResumableFile(target, HEADER, METADATA) as file:
        for number, name in enumerate(HEADER):
            there = {one: read() for one in HEADER if (read := file.reader(one)) is not None}
            assert list(there) == list(HEADER)[: max(1, number)]
            assert all(torch.equal(value, values()[one]) for one, value in there.items())
            assert all(value.dtype == HEADER[one][0] for one, value in there.items())
            if number > 0:
                file.add(values()[name])
        assert file.reader("other") is None
        file.finish()
    finished(tmp_path / "at once")
    assert target.read_bytes() == (tmp_path / "at once").read_bytes(), "reading moves nothing"


def hidden(target, word):
    return target.with_name(f".{target.name}.adamerge-{word}")


@pytest.mark.parametrize(
    ("damage", "kept"),
    [
        (lambda data, log: (data, log[:-5]), 1),
        (lambda data, log: (data, log + "no hash"), 2),
        (lambda data, log: (data[:-3], log), 1),
        (lambda data, log: (data[:-30], log), 0),
        (lambda data, log: (data + b"more", log), 2),
        (lambda data, log: (data[:-1] + bytes([data[-1] ^ 1]), log), 1),
        (lambda data, log: (data, ""), 0),
        (lambda data, log: (data[:20], log), 0),
        (lambda data, log: (b"x" + data[1:], log), 0),
    ],
)
def test_what_does_not_read_back_is_written_again(damage, kept, tmp_path):
    target = tmp_path / "file"
    begun(target, 2)
    data, log = damage(hidden(target, "unfinished").read_bytes(), hidden(target, "written").read_text())
    hidden(target, "unfinished").write_bytes(data)
    hidden(target, "written").write_text(log)
    assert finished(target) == kept
    assert all(torch.equal(value, values()[name]) for name, value in load_file(target).items())


@pytest.mark.parametrize("lost", ["unfinished", "written"])
def test_one_of_the_two_is_not_enough(lost, tmp_path):
    begun(tmp_path / "file", 2)
    hidden(tmp_path / "file", lost).unlink()
    assert finished(tmp_path / "file") == 0


def test_other_metadata_begin_anew(tmp_path):
    begun(tmp_path / "file", 2)
    assert finished(tmp_path / "file", {"made": "otherwise"}) == 0


def test_what_stood_there_stays_until_the_end(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    begun(tmp_path / "file", 3)
    assert (tmp_path / "file").read_bytes() == b"old"
    finished(tmp_path / "file")
    assert load_file(tmp_path / "file").keys() == HEADER.keys()


def test_a_place_that_is_no_folder(tmp_path):
    (tmp_path / "plain").write_text("a file")
    with (
        pytest.raises(ExportError, match="cannot be written"),
        ResumableFile(tmp_path / "plain/file", HEADER, METADATA),
    ):
        pass


def test_a_tensor_that_the_header_does_not_announce(tmp_path):
    with ResumableFile(tmp_path / "file", HEADER, METADATA) as file, pytest.raises(AssertionError):
        file.add(torch.zeros(2, 2))
