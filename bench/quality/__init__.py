"""Does it keep the meaning? Kara against its peers and against chance, on texts that every installation has.

make quality                       # about an hour on two cores; goes on where this user's last run stopped
make quality ARGS="--quick"        # five minutes: fewer texts, methods and retentions

replay.py    one text through the model once, then any compression of what it left in the cache
methods.py   every method by name; peers.py: the scorers of others; both see a replay's windows
texts.py, tasks.py   what is read and what is asked
measure.py   fidelity and recall of a replay; decode.py: the same while really decoding, with KaraCache
run.py       what is measured, and in which order
sources.py   whether what was measured before, by this code or another, still holds
statistics.py, report.py, picture.py   what came out
"""
