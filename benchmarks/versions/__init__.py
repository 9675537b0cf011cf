"""Ask two versions of the server the same questions, and report what differs."""
