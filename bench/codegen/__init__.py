"""`make codegen`: the machine code of every kernel, for six GPUs and two versions of Triton, as a table.

shapes.py    the calls that make every kernel in every shape class
inspect.py   facts of one compiled kernel, read from its machine code
goals.py     what must hold of every row, and where it cannot
report.py    the page
"""
