"""A running server under load, seen from its clients. Nothing here is loaded to serve."""
