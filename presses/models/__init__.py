"""What a press asks of a model, and how it leaves it."""
