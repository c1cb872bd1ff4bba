"""Score networks of a run or of files, over its checkpoints too: tables, costs, a conclusion in words."""
