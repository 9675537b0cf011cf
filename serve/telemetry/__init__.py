"""What the people who run the server see: logs, metrics, traces, processes."""
