"""Reusable contexts in storage tiers: how each is compressed, and where it lies (EVICPRESS, arXiv 2512.14946).

Host logic without an engine. Names are imported from their modules.
"""
