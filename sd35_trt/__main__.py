"""``python -m sd35_trt`` is the command line."""

from .cli import main

main()
