"""`make bench`: times one compression on a CPU with the library's PyTorch path and with the baselines."""
