"""Finished runs: what a run folder says of itself: whose coefficients, from which data, with which settings, at what cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adamerge.artifacts.model_sources import RUN, source_of
from adamerge.data import Calibration
from adamerge.data.overlap import overlap
from adamerge.errors import ConfigError
from adamerge.io.coefficient_file import read_coefficients
from adamerge.io.run_folder import COEFFICIENTS, CONFIG
from adamerge.io.task_vector_file import read_task_vectors
from adamerge.runs.config_files import read_config
from adamerge.runs.configuration import configurations
from adamerge.runs.early_checks import made_subclass
from adamerge.runs.parser import read
from adamerge.runs.run_folders import summary_of
from adamerge.task_vectors.task_vectors import TaskVectors

NO_DATA, UNLABELLED, LABELLED = SECTIONS = ("no data", "unlabelled", "labelled")
"""What a method's result has seen: the sections of a comparison's table."""
OF_DATA = ("batch_size", "seed", "calibration_samples", "train_samples", "shots", "held_out")
PLAIN = (bool, int, float, str)


def names_of(runs: Sequence[Path]) -> dict[str, Path]:
    """Returns runs by the names of their rows, which are the ends of their paths.

    Raises:
        ConfigError: two are the same.
    """
    named = {"/".join(run.resolve().parts[-2:]): run for run in runs}
    if len(named) < len(runs):
        raise ConfigError(f"two runs have the same name: {[str(run) for run in runs]}", todo="name each once")
    return named


def check_models(run: Path, vectors: TaskVectors) -> None:
    """Checks whether a run's coefficients are of these models; it may have merged fewer, and vectors that it solved of them.

    Raises:
        ConfigError: they are of others, or the run has not ended well.
    """
    status = summary_of(run).get("status")
    if status != "finished":
        raise ConfigError(f"{run} is no finished run: it is {status or 'without a summary'}", todo="leave it out")
    metadata, _ = read_coefficients(run / COEFFICIENTS)
    own = {"the base": metadata["base"]["fingerprint"]}
    models, solved = dict(metadata["experts"]), set()
    for task, entry in metadata["experts"].items():
        if str(entry.get("source")).startswith(RUN):
            file = source_of(run / COEFFICIENTS, f"expert '{task}'", "--expert", entry["source"], None)
            models |= read_task_vectors(Path(str(file)))["experts_from"]
            solved.add(task)
    own |= {f"expert '{task}'": entry["fingerprint"] for task, entry in models.items() if task not in solved}
    given = {"the base": vectors.base.fingerprint}
    given |= {f"expert '{task}'": expert.fingerprint for task, expert in vectors.checkpoints.items()}
    for who, fingerprint in own.items():
        if given.get(who) != fingerprint:
            raise ConfigError(
                f"{run}: {who} is not the pool's",
                expected=f"fingerprint {str(given.get(who))[:16]}" if who in given else f"one of {list(given)}",
                got=fingerprint[:16],
                todo="compare runs of one pool",
            )


def stages_of_run(run: Path) -> list[Mapping[str, Any]]:
    """Returns the summary of each stage of a run; of the run itself where it has none."""
    summary = summary_of(run)
    return list(summary.get("stages", {}).values()) or [summary]


def section_of(run: Path) -> str:
    """Returns what the run's coefficients have seen in any stage: no data, inputs alone, or labels."""
    protocols = [stage.get("protocol") or {} for stage in stages_of_run(run)]
    if any(protocol.get("labelled") or _labels_chose(protocol) for protocol in protocols):
        return LABELLED
    seen = {"calibration_split", "recalibrated_buffers"}
    return UNLABELLED if any(seen & protocol.keys() for protocol in protocols) else NO_DATA


def _labels_chose(protocol: Mapping[str, Any]) -> bool:
    """Returns whether labels decided which step a stage ended with; until version 0.4 there was no other way to choose."""
    selection = protocol.get("selection")
    return selection is not None and bool(selection.get("labelled", True))


def costs_of(run: Path) -> dict[str, Any]:
    """Returns what a run took over all of its stages; None for what its summary, of an earlier version, does not say.

    Returns:
        ``seconds``, ``steps``, ``merged_passes``, ``teacher_passes``, ``peak_bytes`` of the device, else of the process,
        ``learned`` scalars of all stages, and ``share`` of the elements that are merged.
    """
    stages = stages_of_run(run)
    passes = [stage.get("forward_passes") or {} for stage in stages]
    learned = [stage.get("learned") or {} for stage in stages]
    peaks = [stage.get("peak_device_bytes", stage.get("peak_host_bytes")) for stage in stages]
    scalars, elements = _sum([one.get("scalars") for one in learned]), [one.get("of") for one in learned]
    known = [value for value in elements if value]
    return {
        "seconds": _sum([stage.get("seconds") for stage in stages]),
        "steps": _sum([stage.get("step") for stage in stages]),
        "merged_passes": _sum([one.get("merged") for one in passes]),
        "teacher_passes": _sum([one.get("experts") for one in passes]),
        "peak_bytes": max([peak for peak in peaks if peak is not None], default=None),
        "learned": scalars,
        "share": None if scalars is None or not known else scalars / max(known),
    }


def settings_of(run: Path) -> list[dict[str, Any]]:
    """Returns the settings of each stage of a run by which it differs from others: its parts, with their plain arguments."""
    folders = [run / name for name in summary_of(run).get("stages", {})] or [run]
    return [_settings(read_config(folder / CONFIG)) for folder in folders]


def seen_too(run: Path, scored: Calibration, split: str) -> dict[str, int]:
    """Returns how many scored samples of each task were calibration data of a run, but for the transductive setting.

    Args:
        run: whose data its configuration names.
        scored: data that models are scored on.
        split: of these.
    """
    stages = summary_of(run).get("stages", {})
    found: dict[str, int] = {}
    for folder in [run / name for name in stages] or [run]:
        settings = read(configurations(["--config", str(folder / CONFIG)])[0])
        data = made_subclass(Calibration, settings.data)
        if (summary_of(folder).get("protocol") or {}).get("calibration_split") and not data.transductive:
            found |= overlap(data, split, scored)
    return found


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    model, data = config.get("model") or {}, (config.get("data") or {}).get("init_args") or {}
    parts = {key: _told(model.get(key)) for key in ("objective", "parametrization", "search", "solver")}
    steps = (config.get("trainer") or {}).get("max_steps")
    own = {key: data.get(key) for key in OF_DATA}
    return {**{key: part for key, part in parts.items() if part}, "max_steps": steps, **own}


def _told(part: Any) -> str:
    """Returns a part as ``Descent(lr=0.001)``: its class with the arguments that are numbers or texts."""
    if not isinstance(part, dict) or "class_path" not in part:
        return str(part) if isinstance(part, str) else ""
    arguments = part.get("init_args") or {}
    plain = [f"{key}={value}" for key, value in arguments.items() if isinstance(value, PLAIN)]
    inner = [f"{key}={told}" for key, value in arguments.items() if (told := _told(value)) and isinstance(value, dict)]
    return f"{part['class_path'].rpartition('.')[2]}({', '.join([*plain, *inner])})"


def _sum(values: Sequence[Any]) -> Any:
    return None if any(value is None for value in values) else sum(values)
