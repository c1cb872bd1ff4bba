"""Measures the throughput of jobs and loaders beside what the plan predicts."""
