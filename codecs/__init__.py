"""Mathematics of the codec."""
