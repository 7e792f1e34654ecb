"""`model.generate` over packed caches with nothing else changed."""
