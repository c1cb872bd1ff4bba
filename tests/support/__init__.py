"""What several tests use: tiny networks and jobs, ranks, a pretended GPU, a full disk. It holds no test."""
