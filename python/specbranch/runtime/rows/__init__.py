"""Rows of a forward that depend on the rows beside them: found at load, and run so that they do not."""
