"""Adapter files: reading, checking, loading, exporting."""
