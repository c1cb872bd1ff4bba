"""Finished networks: scores, pictures of their features, exports for other libraries."""
