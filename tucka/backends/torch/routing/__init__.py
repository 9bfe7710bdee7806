"""The routing runtime: which route a layer's input gets."""
