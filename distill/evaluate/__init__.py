"""Scores of networks: images with labels, features of them, k-NN and dense probes."""
