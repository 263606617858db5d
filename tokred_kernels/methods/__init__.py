# SPDX-License-Identifier: MIT
"""Token reduction methods, one module or folder for each."""
