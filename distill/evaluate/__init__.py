"""Scores finished networks and draws their features."""
