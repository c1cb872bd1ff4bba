"""``python -m distill``, the form that torchrun and other launchers start."""

from distill.cli import main

main()
