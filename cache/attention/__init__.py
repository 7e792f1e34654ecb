"""Attention over packed layers: from a model's attention call to the segments that it reads."""
