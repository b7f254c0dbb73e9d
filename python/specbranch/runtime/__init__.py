"""One model on one device."""
