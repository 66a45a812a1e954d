"""``python -m kara_kernels``: the environment report, see :mod:`kara_kernels.integrations.environment`."""

from .integrations.environment import main

if __name__ == "__main__":
    raise SystemExit(main())
