"""What wandb wrote on disk, read back: records, configuration, metrics, pictures and artifacts of one run."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path
from typing import Any

import pytest
from wandb.proto import wandb_internal_pb2


def files_of(folder: Path) -> list[Path]:
    """All runs' files below a folder."""
    return sorted(folder.rglob("*.wandb"))


def without_users_own(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """No key or setting of the user's, and nothing left in the user's folders."""
    for key in ("API_KEY", "BASE_URL", "ENTITY", "PROJECT", "DIR", "NAME", "RUN_GROUP", "TAGS", "RUN_ID"):
        monkeypatch.delenv(f"WANDB_{key}", raising=False)
    monkeypatch.setenv("HOME", str(home / "home"))
    monkeypatch.setenv("NETRC", str(home / "netrc"))
    for place in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{place}_DIR", str(home / f"wandb_{place.lower()}"))


class WandbFile:
    """One ``.wandb`` file of a run that was closed: LevelDB's log format, blocks of 32 KiB that records may cross.

    The service writes it a moment after the run was closed.
    """

    def __init__(self, path: Path) -> None:
        end = time.monotonic() + 20
        self.read(path)
        while self.exit_code is None and time.monotonic() < end:
            time.sleep(0.05)
            self.read(path)

    def read(self, path: Path) -> None:
        content, place, parts = path.read_bytes(), 7, b""
        assert content.startswith(b":W&B")
        self.path, self.content, self.records = path, content, []
        while place + 7 <= len(content):
            left = 32768 - place % 32768
            if left < 7:
                place += left
                continue
            length, kind = struct.unpack_from("<HB", content, place + 4)
            parts += content[place + 7 : place + 7 + length]
            place += 7 + length
            if kind in (1, 4):  # whole, or the last part
                self.records.append(wandb_internal_pb2.Record.FromString(parts))
                parts = b""

    def of_kind(self, kind: str) -> list[Any]:
        return [getattr(record, kind) for record in self.records if record.WhichOneof("record_type") == kind]

    @property
    def run(self) -> Any:
        """The record with id, name, group, project and tags."""
        return self.of_kind("run")[0]

    @property
    def config(self) -> dict[str, Any]:
        updates = [*self.run.config.update, *(item for config in self.of_kind("config") for item in config.update)]
        return {update.key: json.loads(update.value_json) for update in updates if update.key}

    @property
    def history(self) -> list[dict[str, Any]]:
        """One dictionary a step; media, which take several keys, become a dictionary in it."""
        rows = []
        for history in self.of_kind("history"):
            rows.append({})
            for item in history.item:
                first, *rest = [item.key] if item.key else item.nested_key
                value = json.loads(item.value_json)
                if rest:
                    rows[-1].setdefault(first, {})["/".join(rest)] = value
                else:
                    rows[-1][first] = value
        return rows

    def values(self, key: str) -> list[Any]:
        return [row[key] for row in self.history if key in row]

    @property
    def artifacts(self) -> list[Any]:
        logged = [record.request.log_artifact.artifact for record in self.records if record.HasField("request")]
        logged += self.of_kind("artifact")
        return [artifact for artifact in logged if artifact.type == "merge-coefficients"]

    @property
    def pictures(self) -> list[Path]:
        return sorted(self.path.parent.glob("files/media/images/**/*.png"))

    @property
    def exit_code(self) -> int | None:
        """What the run was closed with; None while it is open."""
        codes = [record.exit_code for record in self.of_kind("exit")]
        return codes[0] if codes else None
