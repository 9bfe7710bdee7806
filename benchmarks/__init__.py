"""Scripts that measure, and their results as files."""
