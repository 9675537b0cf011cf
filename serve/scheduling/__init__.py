"""Who is let in, whose turn it is, and where the time went. Knows no task but by its face."""
