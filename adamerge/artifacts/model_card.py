"""The model card: the README of an exported folder, with experts, data protocol and coefficients."""

from __future__ import annotations

from huggingface_hub import ModelCardData

import adamerge
from adamerge.artifacts.coefficient_table import text_of
from adamerge.artifacts.coefficients import Coefficients
from adamerge.checkpoints.origins import base_name, shown

COEFFICIENTS_FILE = "adamerge/coefficients.safetensors"
"""In a folder of its own: loaders take every ``*.safetensors`` that lies beside the weights for weights."""


def card(coefficients: Coefficients) -> str:
    """Returns the README of an exported folder: models by names that others know them by, and no path of this machine."""
    vectors = coefficients.task_vectors
    known = base_name(vectors.base, vectors.checkpoints.values())
    data = ModelCardData(
        base_model=[known] if known else None,
        base_model_relation="merge" if known else None,
        tags=["merge", "adamerge"],
    )
    experts = "\n".join(
        f"- `{task}`: `{shown(checkpoint)}` (sha256 `{checkpoint.fingerprint[:16]}`){checkpoint.note}"
        for task, checkpoint in vectors.checkpoints.items()
    )
    told = {"start": "The coefficients begin from", "components": "The task vectors are those of"}
    for which, file in vectors.files.items():
        experts += f"\n\n{told[which]} `{shown(file)}` (sha256 `{file.fingerprint[:16]}`){file.note}."
    table = coefficients.table()
    head = f"| group | {' | '.join(vectors.experts)} |\n|---|{'---|' * len(vectors.experts)}"
    rows = [
        f"| `{group}` | {' | '.join(text_of(own[task]) for task in vectors.experts)} |" for group, own in table.items()
    ]
    shown_table = "\n".join([head, *rows]) if rows else "None: base and start are merged as they are."
    protocol = "\n".join(f"- {key}: {value}" for key, value in coefficients.protocol.items()) or "- no data were used"
    return f"""---
{data.to_yaml()}
---
# Merged model

`{shown(vectors.base)}` (sha256 `{vectors.base.fingerprint[:16]}`) plus {len(vectors.checkpoints)} experts, merged by
{type(coefficients.parametrization).__name__} coefficients after {coefficients.step} steps, with adamerge
{adamerge.__version__}. `{COEFFICIENTS_FILE}` holds the coefficients and the recipe.

## Experts

{experts}

## Data

{protocol}

## Coefficients

{shown_table}
"""
