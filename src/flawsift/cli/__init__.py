"""The command line: thin commands over public functions."""
