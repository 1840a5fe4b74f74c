"""One HTML page about a finished run."""
