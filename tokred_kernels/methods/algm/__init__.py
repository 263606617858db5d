# SPDX-License-Identifier: MIT
"""ALGM: its settings, reducers and calibration."""

from tokred_kernels.methods.algm.calibration import calibrate_thresholds
from tokred_kernels.methods.algm.method import ALGM
from tokred_kernels.methods.algm.thresholds import Similarity, Thresholds

__all__ = ["ALGM", "Similarity", "Thresholds", "calibrate_thresholds"]
