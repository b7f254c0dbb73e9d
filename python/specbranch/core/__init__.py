"""Values of the decoding loop: they import neither torch nor numpy."""
