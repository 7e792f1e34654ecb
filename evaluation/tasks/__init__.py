"""Tasks: questions about a context, asked over compressed caches."""
