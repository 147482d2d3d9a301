"""A running server under load, seen from its clients. A server loads the command alone."""
