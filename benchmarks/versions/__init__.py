"""Two versions of the server, asked the same questions: what differs."""
