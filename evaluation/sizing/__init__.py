"""What a model and its cache will weigh, and what fits."""
