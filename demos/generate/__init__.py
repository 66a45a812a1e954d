"""The demo behind ``python -m demos.generate``.

It decodes the same prompt with the full cache and with :class:`KaraCache`, then measures how close the compressed cache
stays to the full one:

    __main__.py   options and their checks; imports nothing slow
    memory.py     checks that the caches fit into memory
    run.py        the phases of the demo
    decode.py     decodes with both caches in turns
    closeness.py  feeds one text through all caches (teacher forcing)
    report.py     tables, texts and the JSON file
    picture.py    the picture
"""
