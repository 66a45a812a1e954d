"""Kara in vLLM: scheduler, runner and worker."""
