"""Reusable contexts in vLLM: stored as packets in tiers, admitted instead of being computed again.

- :mod:`.settings` reads the settings under ``contexts``;
- :mod:`.configure` rejects unsupported configurations, and sets vLLM's connector and scheduler;
- :mod:`.jobs` is what the scheduler's half and the workers' half say to each other;
- :mod:`.grains` divides the shared memory in which packets lie;
- :mod:`.transfers` carries packets through it, between GPU and lower tiers;
- :mod:`.disk` is such a tier, in a :mod:`folder <kara_kernels.contexts.folder>` of its own;
- :mod:`.remote` is one that several servers have in common, in a :mod:`.store`, for models of the same :mod:`.weights`;
- :mod:`.sharing` finds there what others have stored, and offers what is stored here;
- :mod:`.closed` are tiers that could not be written;
- :mod:`.manager` decides, in the scheduler's process, what is stored, admitted and moved;
- :mod:`.trace` writes what happens to contexts to a file;
- :mod:`.scheduler` gives vLLM's scheduler the hits, under hashes of their own;
- :mod:`.worker` encodes and decodes, between the KV cache and the shared memory;
- :mod:`.connector` is what vLLM calls.
"""
