"""What people see of a run while it trains: panel, lines, tables and words on a terminal, rows in trackers."""
