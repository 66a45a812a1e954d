"""Kara: compresses windows of running sequences while they decode.

The public names are in :mod:`kara_kernels` and :mod:`kara_kernels.engine`.
"""
