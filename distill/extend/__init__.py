"""Names in a recipe or on the command line to objects: built-in tables, and entry points of installed packages."""
