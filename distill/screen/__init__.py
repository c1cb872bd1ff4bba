"""What people see in a terminal: panel, lines, tables and words of a run, rows in trackers, the keys of a recipe explained."""
