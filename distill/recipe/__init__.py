"""The keys of a recipe, the rules between them, the reader and its messages."""
