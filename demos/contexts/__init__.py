"""Contexts in vLLM: the same questions about the same documents, with contexts computed again, kept whole, or kept
compressed.

    make demo-contexts

Servers run one after the other. Each answers the same requests about documents of very different popularity.
"""
