"""The verbs: parse, call, print, set the exit code. Imports nothing heavy until a verb needs it."""
