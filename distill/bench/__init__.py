"""Measures the throughput of jobs and loaders beside what the plan predicts, counts a step, simulates days of a job."""
