"""Measures the throughput of jobs and loaders beside what the plan predicts, and tests the evaluation on made-up images."""
