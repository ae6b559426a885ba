"""Checkpoints of a run: whole or not at all, also when the disk is full or the process is killed or asked to end."""

import os
import signal
from pathlib import Path

import pytest
import torch
from running import adam_state, child, command, fit_words, pool_config, without_pictures, write_yaml

from adamerge.errors import CheckpointError, ExportError
from adamerge.training import MergingModule
from adamerge.training.run_checkpoints import AtomicCheckpoints


def test_checkpoints_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path, io = tmp_path / "last.ckpt", AtomicCheckpoints()
    io.save_checkpoint({"global_step": 1}, path)

    def torn(checkpoint, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(ExportError, match="last.ckpt"):
        io.save_checkpoint({"global_step": 2}, path)
    assert io.load_checkpoint(path)["global_step"] == 1
    assert [found.name for found in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_full_disk_is_a_typed_error_that_says_so(tmp_path, monkeypatch):
    """Torch, which opens a path by itself, would say that a position is unexpected."""
    plain = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *given: plain(Path("/dev/full") if "wb" in given else self, *given))
    with pytest.raises(ExportError, match=r"last.ckpt' cannot be written: No space left on device") as caught:
        AtomicCheckpoints().save_checkpoint({"w": torch.zeros(100_000)}, tmp_path / "last.ckpt")
    assert "bytes free" in str(caught.value)


@pytest.mark.slow
def test_a_kill_while_a_checkpoint_is_written_leaves_the_old_one(tmp_path):
    code = (
        "import os, pathlib, torch\nfrom adamerge.training.run_checkpoints import AtomicCheckpoints\n"
        "path, plain = pathlib.Path('last.ckpt'), torch.save\nio = AtomicCheckpoints()\n"
        "io.save_checkpoint({'global_step': 1}, path)\n"
        "def die(value, file):\n    file.write(b'half'); file.flush(); os.kill(os.getpid(), 9)\n"
        "torch.save = die\nio.save_checkpoint({'global_step': 2}, path)"
    )
    assert child(["-c", code], tmp_path).returncode == -signal.SIGKILL
    assert AtomicCheckpoints().load_checkpoint(tmp_path / "last.ckpt")["global_step"] == 1
    assert len(list(tmp_path.iterdir())) == 2, "the torn file has another name"
    AtomicCheckpoints().save_checkpoint({"global_step": 3}, tmp_path / "last.ckpt")
    assert [found.name for found in tmp_path.iterdir()] == ["last.ckpt"], "and is swept by the next"


def test_a_corrupt_checkpoint_is_a_typed_error_that_names_it(tmp_path):
    path, io = tmp_path / "step=3.ckpt", AtomicCheckpoints()
    io.save_checkpoint({"global_step": 3, "w": torch.arange(50)}, path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 37):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"step=3\.ckpt"):
            io.load_checkpoint(path)


@pytest.fixture
def pool_file(pool, image_folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    without_pictures(monkeypatch)
    return write_yaml(tmp_path / "tiny.yaml", pool_config(pool, image_folders))


@pytest.fixture
def handlers():
    """What a process does when it is asked to end, which the trainer changes."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "times", "code", "step"), [
    (signal.SIGINT, 1, 130, 38),
    (signal.SIGTERM, 1, 143, 38),
    (signal.SIGINT, 2, 130, 30),
])  # fmt: skip
def test_who_is_asked_to_end_finishes_the_step_and_keeps_it(
    sent, times, code, step, pool_file, handlers, monkeypatch, capfd
):
    """Checkpoints are 10 steps apart, and the 38th is half done; who asks twice has the last of them."""
    plain = MergingModule.training_step

    def asked(self, batch, batch_idx):
        for _ in range(times if self.global_step == 37 else 0):
            os.kill(os.getpid(), sent)
        return plain(self, batch, batch_idx)

    monkeypatch.setattr(MergingModule, "training_step", asked)
    words = fit_words(pool_file, "--name=n", "--id=a", steps=100)
    assert command(capfd, "fit", *words).code == code
    assert adam_state(Path("runs/n/a"))["step"] == step
