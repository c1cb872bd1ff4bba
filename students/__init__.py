"""What is trained: backbones by name and in free sizes, heads, and the objective without heads."""
