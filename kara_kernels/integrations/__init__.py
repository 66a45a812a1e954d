"""Adapters that run Kara inside inference engines."""
