"""The demonstration behind ``python -m demos.generate``.

It decodes the same prompt with the full cache and with :class:`KaraCache`, then measures how close the
compressed cache stays to the full one. One module per question:

    __main__.py   what may be asked: options and checks; nothing slow is imported before they passed
    run.py        what happens: generation with both caches, teacher forcing of one text through all of them
    report.py     what came out: tables, texts and the JSON file
    picture.py    the same as one picture
"""
