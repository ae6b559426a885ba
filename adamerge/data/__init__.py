"""Data: calibration batches of every task, and labelled splits for reporting."""

from adamerge.data.base import Calibration
from adamerge.data.images import ImageCalibration, ImageTask
from adamerge.data.vocabulary import Vocabulary, load_vocabulary, vocabularies

__all__ = ["Calibration", "ImageCalibration", "ImageTask", "Vocabulary", "load_vocabulary", "vocabularies"]
