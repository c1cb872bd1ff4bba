"""Read what a user gives, before it has a meaning: the text of a recipe, the files and pixels of a source, packages and code that are named."""
