"""``make reasoning``: does a compressed cache keep the reasoning? Problems with known answers, served by vLLM.

__main__.py   options, what is measured, exit codes
problems.py   the problems, from a seed
model.py      the default model, which packages ship in parts
ask.py        asks a server, and compares a reply with that of the full cache
run.py        a server per method and retention; goes on where it was stopped
report.py     paired differences, the page and the picture
"""
