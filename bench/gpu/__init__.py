"""``python -m bench.gpu``: for machines with a GPU. Checks correctness, then times by CUDA-graph replay.

measure.py   cases, checks, timing
report.py    page, plot, comparison of two runs
packets.py   contexts between the GPU and the host's memory: python -m bench.gpu --packets
"""
