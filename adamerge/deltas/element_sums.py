"""Element sums: sums where each element has a coefficient of its own, or one of its row and one of its column."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from adamerge.deltas.kernels import SharedSums
from adamerge.deltas.row_buffers import room
from adamerge.deltas.tuning import TILE


class ElementSums(SharedSums):
    """Sums where each element has a coefficient.

    Args:
        part: of the flattened tensor, which is that of the coefficients too.
    """

    def __init__(self, part: slice) -> None:
        self.touched = part

    def sum(self, rows: Tensor, coefficients: Tensor) -> Tensor:
        """Returns the rows times their coefficients, element by element, added up."""
        own = coefficients[:, self.touched]
        out = torch.mul(rows[0], own[0])
        self.accumulate(out, rows[1:], coefficients[1:])
        return out

    def accumulate(self, out: Tensor, rows: Tensor, coefficients: Tensor) -> None:
        """Adds each row times its coefficients onto ``out``."""
        for row, own in zip(rows, coefficients[:, self.touched], strict=True):
            out.addcmul_(row, own)

    def contract(self, rows: Tensor, gradient: Tensor) -> Tensor:
        """Returns the products of each row with the gradient, element by element."""
        return rows * gradient


class Tile(NamedTuple):
    """Whole rows of a matrix, or a piece of one row: which elements of a part, which rows and which columns."""

    elements: slice
    rows: slice
    columns: slice

    @property
    def shape(self) -> tuple[int, int]:
        """Returns how many rows and columns the tile has."""
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start


class RowColumnSums(SharedSums):
    """Sums where element (i, j) of a matrix has the coefficient ``r[i] + c[j]``; r first, then c.

    Both are of the same read of the deltas: on a CPU they are multiplied a few rows of the matrix at a time, which stay in
    the processor's cache.

    Args:
        rows: of the matrix.
        columns: of the matrix.
        part: of the flattened matrix.
        device: where sums are computed.
    """

    def __init__(self, rows: int, columns: int, part: slice, device: torch.device) -> None:
        self.rows, self.columns, self.part, self.device = rows, columns, part, device
        first = part.start // columns if columns else 0
        self.touched = slice(first, rows + columns)

    def tiles(self) -> Iterator[Tile]:
        """Yields the tiles of the part, in order: the rest of a row, whole rows, and the beginning of one."""
        start, stop, columns = self.part.start, self.part.stop, self.columns
        few = max(1, TILE // columns) if self.device.type == "cpu" and columns else self.rows
        at = start
        while at < stop:
            row, column = divmod(at, columns)
            whole = min(few, (stop - at) // columns) if column == 0 else 0
            end = at + whole * columns if whole else min(stop, (row + 1) * columns)
            elements = slice(at - start, end - start)
            if whole:
                yield Tile(elements, slice(row, row + whole), slice(0, columns))
            else:
                yield Tile(elements, slice(row, row + 1), slice(column, column + end - at))
            at = end

    def sum(self, rows: Tensor, coefficients: Tensor) -> Tensor:
        """Returns the rows times the sums of their two coefficients, added up."""
        out = room([rows.shape[1]], coefficients.dtype, rows.device)
        for tile in self.tiles():
            self._tile(out, rows, coefficients, tile, fresh=True)
        return out

    def accumulate(self, out: Tensor, rows: Tensor, coefficients: Tensor) -> None:
        """Adds each row times the sums of its two coefficients onto ``out``."""
        for tile in self.tiles():
            self._tile(out, rows, coefficients, tile, fresh=False)

    def _tile(self, out: Tensor, rows: Tensor, coefficients: Tensor, tile: Tile, fresh: bool) -> None:
        own = out[tile.elements].view(tile.shape)
        of_columns = slice(self.rows + tile.columns.start, self.rows + tile.columns.stop)
        scale = room(tile.shape, out.dtype, out.device)
        for number, row in enumerate(rows):
            torch.add(coefficients[number, tile.rows, None], coefficients[number, of_columns], out=scale)
            values = row[tile.elements].view(tile.shape)
            if fresh and number == 0:
                torch.mul(values, scale, out=own)
            else:
                own.addcmul_(values, scale)

    def contract(self, rows: Tensor, gradient: Tensor) -> Tensor:
        """Returns the products of each row with the gradient, summed over the matrix's columns, and over its rows.

        The latter in float64 on a CPU, where there is a sum for each tile.
        """
        count, first = len(rows), self.touched.start
        of_rows = gradient.new_zeros(count, self.rows - first)
        exact = torch.float64 if gradient.device.type == "cpu" else gradient.dtype
        of_columns = gradient.new_zeros(count, self.columns, dtype=exact)
        made = room([0], gradient.dtype, gradient.device)
        for tile in self.tiles():
            shape, own = (count, *tile.shape), slice(tile.rows.start - first, tile.rows.stop - first)
            if made.shape != shape:
                made = room(shape, gradient.dtype, gradient.device)  # of the same memory for tile after tile
            products = torch.mul(rows[:, tile.elements].view(shape), gradient[tile.elements].view(shape[1:]), out=made)
            of_rows[:, own] += products.sum(dim=2)
            of_columns[:, tile.columns] += products.sum(dim=1)
        return torch.cat([of_rows, of_columns.to(gradient.dtype)], dim=1)
