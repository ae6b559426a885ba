"""Samples: the rows of a split that a network can use, preprocessed; the others are skipped and counted."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from adamerge.backbones import Inputs
from adamerge.data.row_numbers import described
from adamerge.errors import AdamergeError, DataError

if TYPE_CHECKING:
    import datasets

KEPT_AHEAD = 1 << 30
"""Bytes of a split that are kept from the first look at all rows: 7,000 pictures of 224 x 224. What is beyond is read again
when it is drawn, so that a short fit on much data takes no more memory than it has samples."""
EXAMPLES = 3


class Samples(Dataset[Inputs]):
    """Preprocessed samples of one split: those of its rows that can be preprocessed, in their order, kept in memory.

    All rows are read at once, here: what cannot be used is known before a fit, whatever the fit draws and however many
    processes it has. A row cannot be used if its picture is broken, its text is empty, or nothing in it can be predicted.

    Args:
        rows: of the split.
        columns: that make a sample: of one, its value is preprocessed, of several, a mapping of them.
        preprocess: one decoded sample to tensors; images are all of one shape, sequences may differ in length.
        where: task and split, for errors.
        workers: processes that read; 0 reads in this one. With any, samples that are one tensor are in shared memory.
        unusable_share: of the rows that may be skipped.

    Attributes:
        numbers: of the rows that are samples, among ``rows``.
        skipped: number of each row that is not to the reason.

    Raises:
        DataError: more rows cannot be used, or images are not of one shape.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        columns: Sequence[str],
        preprocess: Callable[[Any], Inputs],
        where: str,
        *,
        workers: int = 0,
        unusable_share: float = 0.05,
    ) -> None:
        # only these columns: the labels of unlabelled data are never read
        self.rows, self.columns = rows.select_columns(list(columns)), tuple(columns)
        self.preprocess, self.where, self._all = preprocess, where, rows
        self.numbers: list[int] = []
        self.skipped: dict[int, str] = {}
        self._decoded: dict[int, Inputs] = {}
        self._shared: tuple[Tensor, Tensor] | None = None
        self._read_all(workers, unusable_share)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Inputs:
        index = int(index)
        if self._shared is not None and self._shared[1][index]:
            return self._shared[0][index]
        if index not in self._decoded:
            decoded = self._decode(self.numbers[index])
            if isinstance(decoded, _Unusable):  # it could be read before the fit
                row = self.described(self.numbers[index])
                raise DataError(f"{self.where}: {row} cannot be read any more: {decoded.reason}")
            self._keep(index, decoded)
        return self._decoded[index] if self._shared is None else self._shared[0][index]

    def described(self, number: int) -> str:
        """Returns where a row of ``rows`` stood in what was read, and the path of its picture."""
        return described(self._all, number, self.columns)

    def examples(self) -> str:
        """Returns the first rows that are skipped, with the reasons."""
        return "; ".join(f"{self.described(row)}: {why}" for row, why in list(self.skipped.items())[:EXAMPLES])

    def _read_all(self, workers: int, share: float) -> None:
        kept, shape = 0, None
        for number, decoded in enumerate(self._read(workers)):
            if isinstance(decoded, _Unusable):
                self.skipped[number] = decoded.reason
                if len(self.skipped) > share * len(self.rows):
                    raise self._too_many(number + 1, share, decoded.todo)
                continue
            if isinstance(decoded, Tensor):
                self._check_shape(number, decoded, shape)
                shape = decoded.shape
                if workers and self._shared is None:
                    values = torch.empty(len(self.rows), *shape, dtype=decoded.dtype).share_memory_()
                    self._shared = values, torch.zeros(len(self.rows), dtype=torch.bool).share_memory_()
            self.numbers.append(number)
            if kept < KEPT_AHEAD:
                self._keep(len(self.numbers) - 1, decoded)
                kept += sum(part.nbytes for part in ([decoded] if isinstance(decoded, Tensor) else decoded.values()))
        if not self.numbers:
            raise self._too_many(len(self.rows), share, None)

    def _read(self, workers: int) -> Iterator[Inputs | _Unusable]:
        if workers == 0:
            yield from map(self._decode, range(len(self.rows)))
            return
        # a generator of its own: a loader draws from the global one
        reading: Any = _Reading(self)
        generator = torch.Generator()
        for decoded in DataLoader(
            reading, batch_size=None, num_workers=workers, generator=generator, collate_fn=_as_is
        ):
            if isinstance(decoded, dict):  # each tensor of another process keeps a file open
                yield {name: part.clone() for name, part in decoded.items()}
            else:
                yield decoded.clone() if isinstance(decoded, Tensor) else decoded

    def _keep(self, index: int, decoded: Inputs) -> None:
        if self._shared is not None and isinstance(decoded, Tensor):
            self._shared[0][index], self._shared[1][index] = decoded, True
        else:
            self._decoded[index] = decoded

    def _decode(self, number: int) -> Inputs | _Unusable:
        return _decoded(self.rows, number, self.columns, self.preprocess)

    def _check_shape(self, number: int, decoded: Tensor, shape: torch.Size | None) -> None:
        if shape is not None and decoded.shape != shape:
            raise DataError(
                f"{self.where}: {self.described(number)} has another shape than the rows before it after preprocessing",
                expected=tuple(shape),
                got=tuple(decoded.shape),
            )

    def _too_many(self, looked_at: int, share: float, todo: str | None) -> DataError:
        first = next(iter(self.skipped), None)
        example = "" if first is None else f"; first {self.described(first)}: {self.skipped[first]}"
        of = f"{looked_at} rows" if looked_at == len(self.rows) else f"the first {looked_at} of {len(self.rows)} rows"
        return DataError(
            f"{self.where}: {len(self.skipped)} of {of} cannot be used{example}",
            where=self.examples() or None,
            expected=f"at most {share:.0%} of the rows, which are then skipped",
            got=len(self.skipped),
            todo=f"{f'{todo}; or ' if todo else ''}repair or remove them, or set data.unusable_share",
        )


def skipped_lines(read: Mapping[tuple[str, str], Samples]) -> list[str]:
    """Returns, of each split that was read and has some, how many rows are skipped, and the first of them with reasons.

    Args:
        read: samples by task and split.
    """
    return [
        f"task '{task}': {len(samples.skipped)} of {len(samples.rows)} rows of the {split} split cannot be used and are "
        f"skipped; {samples.examples()}"
        for (task, split), samples in read.items()
        if samples.skipped
    ]


def can_be_used(
    rows: datasets.Dataset, columns: Sequence[str], preprocess: Callable[[Any], Inputs], number: int
) -> bool:
    """Returns whether a row can be a sample, of these columns and so preprocessed."""
    return not isinstance(_decoded(rows.select_columns(list(columns)), number, columns, preprocess), _Unusable)


def _decoded(
    rows: datasets.Dataset, number: int, columns: Sequence[str], preprocess: Callable[[Any], Inputs]
) -> Inputs | _Unusable:
    try:
        row = rows[number]
        return preprocess(row[columns[0]] if len(columns) == 1 else row)
    except MemoryError:
        raise
    except AdamergeError as error:
        return _Unusable(error.what, error.todo)
    except Exception as error:  # of whatever library reads it
        told = re.sub(r" ?<[\w.]+ object at 0x\w+>", "", str(error))  # where it was in memory
        return _Unusable(" ".join(told.split()) or type(error).__name__, None)


class _Unusable:
    """Stands for a row that is no sample.

    Args:
        reason: why.
        todo: what to do about it, where that is known.
    """

    def __init__(self, reason: str, todo: str | None) -> None:
        self.reason, self.todo = reason, todo


class _Reading(Dataset[Any]):
    """Reads samples in worker processes: each row, or why it is none."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples.rows)

    def __getitem__(self, number: int) -> Inputs | _Unusable:
        return self.samples._decode(number)


def _as_is(decoded: Any) -> Any:
    return decoded
