"""Compresses running requests while they decode: configuration, scheduler, runner and worker."""
