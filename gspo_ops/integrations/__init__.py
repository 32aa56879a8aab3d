"""Adapters to trainers and models that people use: they add no mathematics and patch nothing."""
