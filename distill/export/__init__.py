"""Exports of a finished network for other libraries, each verified by reading it back."""
