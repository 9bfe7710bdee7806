"""Start, watch and fix the routes of a model."""
