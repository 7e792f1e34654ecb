"""How a context is read: prefill in chunks, progress, memory given back."""
