"""Where trial runs take place: here, on Ray actors, on ranks."""
