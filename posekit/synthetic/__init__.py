"""Objects and scenes whose poses are known."""
