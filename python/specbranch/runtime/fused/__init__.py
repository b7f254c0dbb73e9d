"""Layers with fewer kernels: a known module's forward as a few ops of specbranch_ext."""
