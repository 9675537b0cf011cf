"""SAM-6D's network: agreement with the original's numbers, and seconds."""
