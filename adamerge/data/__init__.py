"""Data: calibration batches of every task, and labelled splits for reporting."""

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
