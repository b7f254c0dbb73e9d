"""The ops again, in plain torch: readable, slow, and the definition that every kernel must reproduce."""
