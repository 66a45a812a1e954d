"""``python -m bench.gpu``: for whoever has a GPU. Correctness first, then times by CUDA-graph replay.

measure.py   cases, checks, timing
report.py    page, plot, comparison of two runs
"""
