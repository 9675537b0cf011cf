"""What one can ask, a folder for each task: question, cost, split and merge, answer."""
