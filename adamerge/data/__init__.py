"""Data: splits, batches, labels and metrics of the tasks that coefficients are learned and scored on.

Read ``settings`` and ``base`` first: ``Calibration`` is what all kinds of data share, from a task's name to a fit's batches.
It loads no trainer, and no library of data sets until rows are read; ``adamerge.training.data_modules`` makes of it what
Lightning takes.

- What a sample is: ``tables`` (data sets, files and folders, found by ``data_files``, ``saved_sets``, ``picture_paths``),
  ``table_calibration`` (with ``drawn_splits`` for the splits that they lack), ``calibration_rows`` with ``held_out``,
  ``classes`` with ``vocabulary``, ``class_labels`` and ``labels``, and one file a kind of data: ``images``, ``text``,
  ``language``, ``image_text``, ``no_data``.
- How a sample becomes a batch: ``pictures``, ``samples``, ``shots``, ``batch_order``, ``teacher_outputs``, ``loaders``.
- How a picture is spoiled, to see what a merged model makes of it: ``corruptions``.
- What is told and refused: ``checks``, ``notices``, ``protocol``, ``overlap``, ``row_numbers``, ``file_faults``.
- How a sample is scored: ``metrics``, and ``agreement`` where there are no labels. ``dataset`` is a type that the other files
  share.
"""

from adamerge.data.base import Calibration
from adamerge.data.image_text import ImageTextCalibration, ImageTextTask
from adamerge.data.images import ImageCalibration, ImageTask
from adamerge.data.language import LanguageCalibration, LanguageTask
from adamerge.data.no_data import NoData
from adamerge.data.text import TextCalibration, TextTask
from adamerge.data.vocabulary import Vocabulary, load_vocabulary, vocabularies

__all__ = [
    "Calibration",
    "ImageCalibration",
    "ImageTask",
    "ImageTextCalibration",
    "ImageTextTask",
    "LanguageCalibration",
    "LanguageTask",
    "NoData",
    "TextCalibration",
    "TextTask",
    "Vocabulary",
    "load_vocabulary",
    "vocabularies",
]
