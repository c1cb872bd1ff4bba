"""The teacher and its training: ViT, heads, losses, Gram anchoring."""
