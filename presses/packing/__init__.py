"""From prefilled layers to packed layers, inside the forward pass."""
