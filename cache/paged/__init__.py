"""Paged attention: many sequences over one pool of packed pages."""
