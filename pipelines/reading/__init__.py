"""How a context is read: one forward in chunks, with a progress bar."""
