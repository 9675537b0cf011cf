"""The tasks that clients can ask for, one folder each: question, cost, split and merge, answer."""
