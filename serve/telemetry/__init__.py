"""What operators see of the server: logs, metrics, traces, processes."""
