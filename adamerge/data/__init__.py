"""Data: calibration batches of every task, and labelled splits for reporting."""

from adamerge.data.base import Calibration
from adamerge.data.images import ImageCalibration, ImageTask

__all__ = ["Calibration", "ImageCalibration", "ImageTask"]
