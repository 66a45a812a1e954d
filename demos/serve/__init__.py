"""The demo behind ``python -m demos.serve``: the same load for vLLM, with and without Kara.

    __main__.py   options, checks, exit codes
    prompts.py    the prompts of the clients
    demand.py     how many blocks the load needs, and whether there is room for them
    server.py     one OpenAI-compatible server: environment, start, metrics, guaranteed shutdown
    load.py       the clients: each request is a stream of the openai package
    run.py        the phases of the demo: servers and loads in turn
    report.py     figures, table and the JSON file
    picture.py    the picture

It runs in a Python that has vLLM. ``demos.environment`` creates one for CPUs.
"""
