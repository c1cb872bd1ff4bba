"""Read what a user gives, before it has a meaning: the text of a recipe, the images of a source, packages and code that are named."""
