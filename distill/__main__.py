"""``python -m distill``, the form that torchrun and other launchers start."""

from distill.cli.app import main

main()
