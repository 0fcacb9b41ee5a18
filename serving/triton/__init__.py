"""Triton's Python backend over the runtime: two models, of which one streams.

:mod:`~sd35_trt.serving.triton.export` writes them into a model repository.
"""
