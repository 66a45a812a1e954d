"""Kara in vLLM: `vllm serve MODEL --additional-config '{"kara": {"window": 256, "keep": 128}}'`, nothing else.

vLLM finds :func:`register` through the entry point group ``vllm.general_plugins`` and calls it in every process. It
hooks one method, the end of vLLM's own configuration, and does nothing there unless the key ``kara`` is set.

Shared by whatever runs in vLLM:

- :mod:`.hook` is that method, and the order in which a configuration is completed;
- :mod:`.settings` reads what is set under ``kara``;
- :mod:`.layout` finds out where a cache's rows lie;
- :mod:`.stats` carries counters to the front end and shows them on vLLM's own ``/metrics``.

:mod:`.windows` compresses running requests:

- :mod:`.windows.configure` refuses what cannot work, and names scheduler and worker to vLLM;
- :mod:`.windows.scheduler` plans and commits, keeps the books of blocks, before vLLM's scheduler runs;
- :mod:`.windows.runner` records queries, executes the plans before the step, and shifts lengths and slots, inside of
  :mod:`.windows.worker`'s workers.

No file of vLLM is changed. Supported versions: see :data:`.settings.SUPPORTED`.
"""

__all__ = ["register"]


def register() -> None:
    """Entry point of vLLM's plugin system; may be called any number of times."""
    from .hook import install

    install()
