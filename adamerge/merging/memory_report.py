"""The memory report: what people read of a memory plan before a fit and in a check."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from adamerge.merging.memory_plan import Plan
from adamerge.task_vectors.memory import size


def print_plan(plan: Plan, micro_batch: int | None = None) -> None:
    """Prints a plan, with what to do where it does not fit, or where a step merges more often than it looks.

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
    footprint = plan.footprint
    if not footprint.running:
        return f"merged copy {size(footprint.weights)}, its gradient {size(footprint.gradient)}"
    each = f" in each of {plan.processes} processes" if plan.processes > 1 else ""
    return (
        f"of the {plan.copy} what is always there{each} {size(footprint.weights)}, its gradient {size(footprint.gradient)}, "
        f"what is there while it runs {size(footprint.running)}; before that the network is loaded{each}, which takes "
        f"{size(sum(unit.nbytes for unit in plan.units))} of host memory where its file is of another dtype"
    )


def _table(plan: Plan) -> Table:
    """Returns a table with a line for each storage."""
    on_device = plan.device.type != "cpu"
    table = Table("storage", "host peak", *(["device peak"] if on_device else []), "fits", "rounding", box=None)
    for storage in plan.storages:
        peak = plan.peak(storage)
        columns = [peak.host, peak.device] if on_device else [peak.host]
        verdict = "yes" if plan.fits(storage) else "no"
        verdict += ", chosen" if str(storage) == str(plan.chosen) else ""
        table.add_row(escape(str(storage)), *map(size, columns), verdict, storage.rounding)
    return table
