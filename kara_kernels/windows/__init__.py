"""Kara: windows of running sequences, compressed while they decode.

The public names are in :mod:`kara_kernels` and :mod:`kara_kernels.engine`.
"""
