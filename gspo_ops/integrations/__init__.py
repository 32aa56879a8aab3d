"""Adapters to the trainers and models that people have: no mathematics, nothing patched."""
