"""The command line, and the start of several processes."""
