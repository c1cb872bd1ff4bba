"""What is taught from and how it is made: ViT, heads, losses, Gram anchoring."""
