"""Score networks of a run or of files, over its checkpoints too: tables, costs, a conclusion in words, and a test of all that on made-up images."""
