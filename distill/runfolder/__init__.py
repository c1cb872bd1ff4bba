"""Every file of a run folder: status, metrics, heartbeats, requests, failures, checkpoints, licences."""
