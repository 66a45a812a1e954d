"""Kara in vLLM: `vllm serve MODEL --additional-config '{"kara": {"window": 256, "keep": 128}}'` enables it.

vLLM finds :func:`register` through the entry point group ``vllm.general_plugins`` and calls it in every process. It
hooks one method, the end of vLLM's own configuration, and does nothing there unless the key ``kara`` or ``contexts`` is
set, or ``--kv-transfer-config`` names our connector.

Shared modules:

- :mod:`.hook` has that method, and the order in which a configuration is completed;
- :mod:`.settings` reads the settings under ``kara``;
- :mod:`.requests` reads what a request asks for, and checks it in the front end;
- :mod:`.layout` finds out where a cache's rows lie, and :mod:`.quantised` the factors of eight-bit floats in it;
- :mod:`.traces` writes lines of JSON, and knows the ids of clients;
- :mod:`.stats` sends counters to the front end and adds them to vLLM's own ``/metrics``.

:mod:`.windows` compresses running requests:

- :mod:`.windows.configure` rejects unsupported configurations, and sets vLLM's scheduler and worker classes;
- :mod:`.windows.scheduler` plans, commits and tracks blocks before vLLM's scheduler runs;
- :mod:`.windows.runner` records queries and executes the plans before the step, inside the workers of
  :mod:`.windows.worker`; :mod:`.windows.runners` shifts lengths and slots in vLLM's two model runners.

No file of vLLM is changed. Supported versions: see :data:`.settings.SUPPORTED`.
"""

__all__ = ["register"]


def register() -> None:
    """Entry point of vLLM's plugin system. May be called any number of times."""
    from .hook import install

    install()
