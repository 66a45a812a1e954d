"""The quality bench: compares Kara with other methods and with random selection, on texts in every installation.

make quality                       # about an hour on two cores; resumes this user's last interrupted run
make quality ARGS="--quick"        # five minutes: fewer texts, methods and retentions

replay.py    runs one text through the model once, then compresses the resulting cache in many ways
methods.py   every method by name; kara_kernels.scorers has their scores; both use a replay's windows
texts.py, tasks.py   the texts and the questions
measure.py   fidelity and recall of a replay; decode.py: the same during actual decoding with KaraCache
run.py       what is measured, and in which order
sources.py   whether earlier measurements are still valid
statistics.py, report.py, picture.py   the results
"""
