"""Files to crops and masks. Knows no recipe and no process group."""
