"""What a run ends with: its summary, pictures of features, scores over its checkpoints."""
