"""Every file through which processes talk: status, metrics, heartbeats, requests, failures."""
