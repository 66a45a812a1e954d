"""Contexts without an engine: what codecs cost, what placement gains."""
