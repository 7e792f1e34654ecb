"""What programs of the split kernel do before packed tokens: turn their queries, attend 16-bit tokens."""
