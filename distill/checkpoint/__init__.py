"""State on disk from which a run goes on, whatever the number of ranks."""
