"""Find which images a source holds, where they lie, and what else lies there."""
