"""SAM-6D's network: its agreement with the original's numbers, and its speed."""
