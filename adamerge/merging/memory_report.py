"""Telling a plan: what of it people read before a fit and in a check."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from adamerge.merging.memory_plan import Plan
from adamerge.task_vectors.memory import size
from adamerge.task_vectors.storage import LowBit, Storage


def print_plan(plan: Plan, micro_batch: int | None = None) -> None:
    """To the console, with what to do where the plan does not fit, or where a step merges more often than it looks.

    Args:
        plan: of a fit.
        micro_batch: samples per forward pass; all of a step's when None.
    """
    console = Console()
    console.print(escape(f"plan {_summary(plan)}"), highlight=False)
    console.print(_table(plan))
    advice = plan.advice()
    if advice is not None:
        console.print(escape(f"warning: {advice}"))
    if plan.copy.each_pass and micro_batch is not None:
        console.print(
            f"warning: with {plan.copy} every micro-batch merges twice; model.micro_batch is {micro_batch}: set it to null, "
            "or as large as activations allow"
        )


def _summary(plan: Plan) -> str:
    mask = f" and a mask of {plan.logits:,} logits" if plan.logits else ""
    there = f"{size(plan.there.host)} of host memory" + (
        "" if plan.device.type == "cpu" else f" and {size(plan.there.device)} of device memory"
    )
    return (
        f"on {plan.device}: {plan.sizes.experts} experts, {len(plan.sizes.tensors)} tensors of {plan.sizes.merged:,} "
        f"elements, {plan.coefficients:,} coefficients in {plan.groups:,} groups{mask}; {there} available. In every "
        f"peak: {_copy(plan)}, learned numbers {size(plan.learned)}. Activations come on top: they are not known before."
    )


def _copy(plan: Plan) -> str:
    held = plan.held
    if not held.running:
        return f"merged copy {size(held.weights)}, its gradient {size(held.gradient)}"
    each = f" in each of {plan.processes} processes" if plan.processes > 1 else ""
    return (
        f"of the {plan.copy} what is always there{each} {size(held.weights)}, its gradient {size(held.gradient)}, what "
        f"is there while it runs {size(held.running)}; before that the network is loaded{each}, which takes "
        f"{size(sum(unit.nbytes for unit in plan.units))} of host memory where its file is of another dtype"
    )


def _table(plan: Plan) -> Table:
    """A line for each storage."""
    on_device = plan.device.type != "cpu"
    found = Table("storage", "host peak", *(["device peak"] if on_device else []), "fits", "rounding", box=None)
    for storage in plan.storages:
        peak = plan.peak(storage)
        columns = [peak.host, peak.device] if on_device else [peak.host]
        verdict = "yes" if plan.fits(storage) else "no"
        verdict += ", chosen" if str(storage) == str(plan.chosen) else ""
        found.add_row(escape(str(storage)), *map(size, columns), verdict, _rounding(storage))
    return found


def _rounding(storage: Storage) -> str:
    if isinstance(storage, LowBit):
        return f"1/{254 if storage.bits == 8 else 14} of a block"
    return {"bfloat16": "2^-8", "float16": "2^-11"}.get(getattr(storage, "dtype", ""), "none")
