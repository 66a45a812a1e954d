"""The demonstration behind ``python -m demos.serve``: the same load for vLLM without and with Kara.

    __main__.py   what may be asked: options, checks, exit codes
    prompts.py    what the clients ask
    demand.py     how many blocks that takes, and whether there is room for them
    server.py     one OpenAI-compatible server: environment, start, metrics, certain end
    load.py       the clients: every request a stream of the openai package
    run.py        what happens: servers and loads in turn
    report.py     what came out: figures, table and the JSON file
    picture.py    the same as one picture

It runs in the Python that has vLLM; ``demos.environment`` makes one for CPUs.
"""
