"""Distils a family of small vision models from one large teacher, in one job."""
