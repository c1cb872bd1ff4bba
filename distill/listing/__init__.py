"""Find what a recipe names outside itself: the images of a source and where they lie, installed packages, code."""
